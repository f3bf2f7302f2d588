"""Process groups of a calibrating job."""

from __future__ import annotations

from torch import distributed as dist

from megatron_lowbit.config import CalibrateConfig
from megatron_lowbit.runtime.distributed import make_groups
from megatron_lowbit.runtime.launcher_env import env_world_size, launched
from megatron_lowbit.runtime.rendezvous import join


def start_groups(config: CalibrateConfig) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Start the parallel groups; returns this rank's (tp_group, dp_group)."""
    ranks = config.tp * config.dp
    if ranks == 1:
        return None, None
    assert launched() and env_world_size() == ranks, "run_stage starts the ranks"
    join()
    return make_groups(config.tp, config.dp)
