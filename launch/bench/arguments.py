"""Arguments of the kinds of `benchmark`, as arguments.py has those of the stages."""

from __future__ import annotations

from typing import TypeVar

from megatron_lowbit.config import PLAN_KEYS, CommConfig, LowBitError, StageConfig, load_config
from megatron_lowbit.launch.arguments import Parser, fail
from megatron_lowbit.launch.bench.config import (
    UNUSED,
    BenchmarkCollectivesConfig,
    BenchmarkGpuConfig,
    BenchmarkKernelsConfig,
    BenchmarkLinearConfig,
    BenchmarkModelConfig,
    refuse_unused,
)
from megatron_lowbit.launch.bench.netlab import no_namespaces
from megatron_lowbit.launch.inputs import check_package, model_name
from megatron_lowbit.launch.layout import check_alone

Config = TypeVar("Config", bound=StageConfig)

NOT_HERE = [*UNUSED, *(f"comm.{key}" for key in CommConfig.model_fields if key not in PLAN_KEYS), "comm.selection"]


def check_arguments(kind: str, argv: list[str]) -> int | None:
    """Return the exit code after one line on standard error, where something is wrong with the arguments; else None."""
    try:
        config = PARSERS[kind](argv)
        if config.wandb != "off":
            check_package("wandb")
    except LowBitError as error:
        return fail(str(error))
    return None


def parse_collectives(argv: list[str]) -> BenchmarkCollectivesConfig:
    parser = Parser(
        prog="megatron-lowbit benchmark collectives",
        description="time all-reduces over real processes, on loopback or behind links of a given rate",
        config=BenchmarkCollectivesConfig,
        unused=NOT_HERE,
    )
    parser.add_argument("--config", help="YAML file of config keys")
    for key, what in {
        "ranks": "numbers of processes, such as 2,4,8",
        "sizes": "of the bf16 tensor, such as 64KiB,1MiB",
        "rate": "of every link, such as 1gbit; without it the ranks talk over loopback",
        "output-dir": "folder of the results",
        "wandb": "off, offline or online",
    }.items():
        parser.add_argument(f"--{key}", help=f"{what}; same as {key.replace('-', '_')}=...")
    parser.add_argument("--tune", action="store_const", const="true", help="same as tune=true")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = vars(parser.parse_intermixed_args(argv))
    file, overrides = args.pop("config"), args.pop("overrides")
    given = [*overrides, *(f"{key}={value}" for key, value in args.items() if value is not None)]
    config = load_config(BenchmarkCollectivesConfig, file, given)
    refuse_unused(config, NOT_HERE)
    if config.rate is not None and (reason := no_namespaces()):
        raise LowBitError(f"rate={config.rate} {reason}; leave rate out to measure on loopback")
    check_alone("benchmark collectives")
    return config


def parse_kernels(argv: list[str]) -> BenchmarkKernelsConfig:
    what = "time the ops of the wire formats on one thread, against eager torch, torch.compile and a copy"
    return _parse("kernels", what, BenchmarkKernelsConfig, argv)


def parse_linear(argv: list[str]) -> BenchmarkLinearConfig:
    what = "time quantized linears on a CPU, against F.linear in bf16 and the low-bit products of torch and oneDNN"
    return _parse("linear", what, BenchmarkLinearConfig, argv)


def parse_model(argv: list[str]) -> BenchmarkModelConfig:
    what = "time a quantized model on a CPU against the same in bf16: prefill, decode, and the memory of each"
    config = _parse("model", what, BenchmarkModelConfig, argv, "where `models` run in one process")
    for name in config.models:
        if name != "random":
            model_name(name)
    return config


def parse_gpu(argv: list[str]) -> BenchmarkGpuConfig:
    what = "check all Triton kernels, NCCL and CUDA graphs on this machine's GPU, and time its linears"
    return _parse("gpu", what, BenchmarkGpuConfig, argv)


def _parse(
    kind: str, what: str, config_class: type[Config], argv: list[str], where: str = "where no model runs"
) -> Config:
    """Read the arguments of a kind that takes keys only."""
    parser = Parser(prog=f"megatron-lowbit benchmark {kind}", description=what, config=config_class, unused=UNUSED)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    config = load_config(config_class, None, parser.parse_args(argv).overrides)
    refuse_unused(config, UNUSED, where)
    check_alone(f"benchmark {kind}")
    return config


PARSERS = {
    "collectives": parse_collectives,
    "kernels": parse_kernels,
    "linear": parse_linear,
    "model": parse_model,
    "gpu": parse_gpu,
}
