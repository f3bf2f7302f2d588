"""What users pass to apply_to_*, checked: each slip is one line that says what was given and what belongs there."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

from torch import nn

from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import CommConfig, CommMode, LowBitError, check_mode


def check_model(function: str, model: Any, kind: str) -> None:
    """Raise LowBitError where the first argument is no model, above all where it is the artifact.

    kind: what the function takes, with its article.
    """
    if isinstance(model, str | Path | Artifact):
        what = "an Artifact" if isinstance(model, Artifact) else repr(str(model))
        raise LowBitError(f"{function} takes {kind} first, then the artifact, not {what} first; swap the arguments")
    if not isinstance(model, nn.Module) and not isinstance(getattr(model, "module", None), nn.Module):
        raise LowBitError(f"{function} takes {kind}, not {_kind(model)}")


def load_artifact(function: str, artifact: Any) -> Artifact:
    """Return the artifact itself, or the one in the folder. Raises LowBitError for anything else."""
    if isinstance(artifact, Artifact):
        return artifact
    if isinstance(artifact, str | Path):
        return Artifact.load(artifact)
    if isinstance(artifact, nn.Module):
        raise LowBitError(f"{function} takes the model first, then the artifact; swap the arguments")
    raise LowBitError(f"{function}: the artifact is a folder or an Artifact, not {_kind(artifact)}")


def as_comm_config(comm_mode: CommMode | CommConfig | None) -> CommConfig:
    """Return the CommConfig that comm_mode stands for. Raises LowBitError for a mode that does not exist."""
    if isinstance(comm_mode, CommConfig):
        return comm_mode
    if comm_mode is not None and not isinstance(comm_mode, str):
        raise LowBitError(f"comm_mode is the name of a mode or a CommConfig, not {_kind(comm_mode)}")
    check_mode("comm_mode", comm_mode)
    # Falling back makes results depend on the calls before, so only a whole CommConfig asks for it.
    return CommConfig(mode=comm_mode, drift_threshold=None)


def as_ranks(name: str, value: Any) -> int:
    """Return the number of ranks as an int. Raises LowBitError for what is no integer of at least 1."""
    try:
        ranks = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        ranks = 0
    if ranks < 1:
        raise LowBitError(f"{name}={value!r} is not a number of ranks; give 1, 2, 4, ...")
    return ranks


def _kind(value: Any) -> str:
    return f"{value!r}" if isinstance(value, int | float | None) else f"a {type(value).__name__}"
