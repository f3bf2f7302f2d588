"""What a bad config ends in."""

import pytest

from megatron_lowbit.config import (
    EvaluateConfig,
    LowBitError,
    load_config,
)


def refused(*overrides: str, stage=EvaluateConfig, file: str | None = None) -> str:
    """Return the message that the overrides (or the file) end in: one line."""
    with pytest.raises(LowBitError) as raised:
        load_config(stage, file, list(overrides))
    message = str(raised.value)
    assert message and "\n" not in message
    return message
