"""What `quantize` chooses for a model where the config does not say it: shard groups and tensor-parallel sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_lowbit.config import QuantizeConfig
from megatron_lowbit.quant.tp_sizes import USUAL_GROUPS, default_shard_groups, default_tp_sizes
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.say import say


def with_choices(config: QuantizeConfig, text_config: Any, widths: Iterable[int]) -> QuantizeConfig:
    """Return the config with weights.shard_groups and comm.tp_sizes, of which the state of an unfinished run is made.

    text_config: the model's; widths: inputs and outputs of its tensor-parallel linears.
    """
    groups = config.weights.shard_groups or default_shard_groups(text_config, widths)
    sizes = default_tp_sizes(text_config) if config.comm.tp_sizes is None else config.comm.tp_sizes
    weights = config.weights.model_copy(update={"shard_groups": groups})
    comm = config.comm.model_copy(update={"tp_sizes": sizes})
    return config.model_copy(update={"weights": weights, "comm": comm})


def tell_shard_groups(groups: int) -> None:
    """Print, on rank 0, how many shard groups were chosen, where it is not the usual number."""
    if groups != USUAL_GROUPS and env_rank() == 0:
        say(f"weights.shard_groups={groups}, chosen for the model's heads and widths")
