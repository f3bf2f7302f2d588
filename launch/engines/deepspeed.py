"""A model on DeepSpeed's inference engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist
from torch import nn

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import (
    CommConfig,
    CommMode,
)
from megatron_lowbit.io.fingerprint import Fingerprint
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.runtime.launcher_env import launched
from megatron_lowbit.runtime.rendezvous import join


@dataclass
class DeepSpeedEngine(Engine):
    """`model` is DeepSpeed's InferenceEngine."""

    @property
    def module(self) -> nn.Module:
        return self.model.module

    @property
    def group(self) -> dist.ProcessGroup | None:
        from megatron_lowbit.adapters import deepspeed

        return deepspeed.tp_group(self.model)

    def sites(self) -> Mapping[str, Any]:
        from megatron_lowbit.adapters import deepspeed

        return deepspeed.row_parallel_sites(self.model)

    def inputs(self) -> Mapping[str, Any]:
        from megatron_lowbit.adapters import deepspeed

        if self.group is None:
            return huggingface.first_readers(huggingface.find_linears(self.module))
        linears = deepspeed.tp_linears(self.model)
        return huggingface.first_readers(
            {**{name: ("column", layer) for name, layer in linears.columns.items()}, **linears.whole}
        )

    def fingerprint(self) -> Fingerprint:
        from megatron_lowbit.adapters import deepspeed

        return huggingface.fingerprint(self.module) if self.group is None else deepspeed.fingerprint(self.model)

    def apply(self, artifact: Artifact, comm_mode: CommMode | CommConfig | None = None) -> None:
        from megatron_lowbit.adapters import deepspeed

        deepspeed.apply_to_deepspeed(self.model, artifact, comm_mode)


def init_deepspeed() -> int:
    """Join the ranks that the launcher started; returns how many there are."""
    from megatron_lowbit.adapters import deepspeed

    package = deepspeed.import_deepspeed()
    assert launched(), "run_stage starts ranks for engine=deepspeed"
    join()
    package.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return dist.get_world_size()
