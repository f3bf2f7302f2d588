"""The tokenizer of a model's folder, or one line that says that there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lowbit.config import LowBitError, shown

FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "*.vocab", "tekken.json")


def load_tokenizer(name: str | Path) -> Any:
    """Load the tokenizer of a folder or hub id. Raises LowBitError for a folder without one, else what transformers
    does."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception:
        folder = Path(name)
        if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in FILES):
            raise LowBitError(no_tokenizer(str(name))) from None
        raise


def check_tokenizer(tokenizer: Any) -> None:
    """Raise LowBitError for the empty tokenizer that transformers makes up for some models' folders without one."""
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise LowBitError(no_tokenizer(tokenizer.name_or_path))


def no_tokenizer(name: str) -> str:
    return (
        f"the model folder {shown(name)} has no tokenizer; copy the model's tokenizer.json and tokenizer_config.json "
        "(or tokenizer.model) into it"
    )
