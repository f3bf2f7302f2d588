"""Process groups of a job whose ranks are data-parallel copies of a model, or share one that is not on an engine."""

from __future__ import annotations

from collections.abc import Sequence

from torch import distributed as dist

from megatron_lowbit.config import CalibrateConfig, EvaluateConfig, WeightsConfig
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.layout import whole_copies
from megatron_lowbit.runtime.distributed import make_groups
from megatron_lowbit.runtime.launcher_env import env_world_size, launched
from megatron_lowbit.runtime.rendezvous import join


def start_groups(config: CalibrateConfig | EvaluateConfig) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Start the parallel groups; returns this rank's (tp_group, dp_group)."""
    ranks = config.tp * config.dp
    if ranks == 1:
        return None, None
    assert launched() and env_world_size() == ranks, "run_stage starts the ranks"
    join()
    return make_groups(config.tp, config.dp)


def start_copies(config: CalibrateConfig | EvaluateConfig, weights: Sequence[WeightsConfig] = ()) -> Engine:
    """Start the engine; with engine=huggingface and dp > 1 each rank has a whole model, and its dp_group holds all."""
    dp_group = None if whole_copies(config) is None else start_groups(config)[1]
    engine = start_engine(config, weights)
    if dp_group is not None:
        engine.dp_group = dp_group
    return engine
