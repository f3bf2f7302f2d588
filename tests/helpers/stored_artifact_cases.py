"""What workers of a RankPool run for test_megatron_stored_artifact.py: `case(rank, size, *args)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
from megatron_checkpoint_cases import applied, hf_config
from megatron_groups import parallel
from megatron_model_cases import said

from megatron_lowbit.artifact import Artifact


def back(
    rank: int, size: int, layout: dict[str, int], jobs: dict[Path, tuple[Path, Artifact]], **options: Any
) -> list[bool]:
    """Write the artifact of each {folder: (model, what is applied to it)}; whether this rank has it."""
    from megatron_lowbit.adapters.megatron.stored_artifact import to_artifact

    with parallel(**layout):
        found = []
        for folder, (model, artifact) in jobs.items():
            gpt, config = applied(model, artifact, **options), hf_config(model)
            whole = to_artifact(gpt, gpt._lowbit_description, config)
            found.append(whole is not None)
            if whole is not None and rank == 0:
                tiny_models.save_artifact(whole, folder)
        return found


def lacking(rank: int, size: int, model: Path, artifact: Artifact, other: Artifact) -> str:
    """What is said where the description is another artifact's."""
    from megatron_lowbit.adapters.megatron.description import description
    from megatron_lowbit.adapters.megatron.stored_artifact import to_artifact

    with parallel(size):
        return said(to_artifact, applied(model, artifact), description(other), hf_config(model))
