"""Which processes a stage runs in: how many its config asks for, and whether they are there. Needs no torch."""

from __future__ import annotations

import math

from megatron_lowbit.config import (
    CalibrateConfig,
    EvaluateConfig,
    LowBitError,
    ParityConfig,
    QuantizeConfig,
    StageConfig,
)
from megatron_lowbit.runtime import launcher_env
from megatron_lowbit.runtime.launcher_env import env_world_size, launched


def check_layout(name: str, config: StageConfig, nproc: int | None) -> int | None:
    """Check the number of processes; returns those that a stage with a layout of its own runs in (`own_ranks`), else
    None.

    Raises LowBitError where a launcher has started, or --nproc asks for, another number than the config needs.
    """
    own = own_ranks(name, config)
    if own is not None:
        check_own(name, own, env_world_size() if launched() else nproc or own)
    elif launched():
        check_world(config, env_world_size())
    else:
        check_world(config, nproc or (1 if config.engine == "huggingface" else world_of(config)))
    return own


def own_ranks(name: str, config: StageConfig) -> int | None:
    """Return the number of processes of a stage that are not simply the tp x pp x dp ranks of its engine; None for all
    others."""
    if name in ("calibrate", "evaluate") and isinstance(config, CalibrateConfig | EvaluateConfig):
        return whole_copies(config)
    if name == "quantize" and isinstance(config, QuantizeConfig):
        if config.dry_run:
            return 1
        return config.tp * config.dp if quantize_method(config) == "qllm" else None
    if name == "parity" and isinstance(config, ParityConfig) and not config.outcomes:
        check_alone("parity")  # the comparison starts the other processes, which are as many as in every stage
        return 1
    return None


def whole_copies(config: CalibrateConfig | EvaluateConfig) -> int | None:
    """Return the number of processes that share the windows or documents, each with a whole model
    (engine=huggingface); None: as every stage."""
    alone = config.tp == config.pp == 1 and not config.sequence_parallel
    return config.dp if config.engine == "huggingface" and config.dp > 1 and alone else None


def ranks_of(name: str, config: StageConfig) -> int:
    """Return the number of processes that a stage runs in."""
    return own_ranks(name, config) or (1 if config.engine == "huggingface" else world_of(config))


def quantize_method(config: QuantizeConfig) -> str:
    """Return qllm where there is text to calibrate it on, unless weights.method says otherwise."""
    return config.weights.method or ("rtn" if config.calibration.data is None else "qllm")


def check_alone(command: str) -> None:
    """Raise LowBitError where a launcher has started several processes of a command that is one."""
    launch = launcher_env.adopt()
    if launch is not None and launch.world_size > 1:
        raise LowBitError(
            f"{command} is one process, which starts the ranks it needs, but a launcher has started "
            f"{launch.world_size}: run it without one (in a Slurm job: by itself or with srun -n1)"
        )


def check_own(name: str, own: int, world: int) -> None:
    """Check the processes of a stage that says how many processes it runs in (its `ranks`)."""
    if world != own:
        needed = f"tp x dp = {own} processes" if own > 1 else "one process"
        raise LowBitError(f"{name} needs {needed}, there are {world}; start that many")


def check_world(config: StageConfig, world: int) -> None:
    if config.engine == "huggingface" and config.tp > 1:
        raise LowBitError(
            f"engine=huggingface runs in one process, not tp={config.tp}: set virtual_tp or engine=deepspeed"
        )
    if config.engine == "deepspeed" and config.virtual_tp > 1:
        raise LowBitError(
            f"virtual_tp={config.virtual_tp} needs engine=huggingface; engine=deepspeed runs real ranks (tp)"
        )
    if config.engine == "megatron" and config.virtual_tp > 1:
        raise LowBitError(
            f"virtual_tp={config.virtual_tp} needs engine=huggingface; engine=megatron runs real ranks (tp)"
        )
    given = {"pp": config.pp > 1, "sequence_parallel": config.sequence_parallel, "dp": getattr(config, "dp", 1) > 1}
    for key, used in given.items():
        if used and config.engine != "megatron":
            raise LowBitError(f"{key}={getattr(config, key)} needs engine=megatron")
    needed = world_of(config)
    if world != needed:
        product = " x ".join(f"{key}={n}" for key, n in _sizes(config).items())
        other = f" or set tp={world}" if needed == config.tp else ""
        raise LowBitError(f"{product} needs {needed} processes, there are {world}; start that many{other}")


def _sizes(config: StageConfig) -> dict[str, int]:
    """Return {key: size} of the kinds of parallelism in use; tp always."""
    sizes = {"tp": config.tp, "pp": config.pp, "dp": getattr(config, "dp", 1)}
    return {key: size for key, size in sizes.items() if key == "tp" or size > 1}


def world_of(config: StageConfig) -> int:
    """Return the number of ranks that its engine asks for."""
    return math.prod(_sizes(config).values())
