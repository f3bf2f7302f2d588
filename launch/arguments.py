"""The arguments of every command, and what can be told of them without torch, whose import takes seconds.

`check_arguments(stage, argv)` is called before a stage's module is imported: a slip of the pen is answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Collection
from functools import partial
from typing import NoReturn

from pydantic import BaseModel

from megatron_lowbit.config import (
    CalibrateConfig,
    ConvertConfig,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    LowBitError,
    ParityConfig,
    QuantizeConfig,
    ServeConfig,
    StageConfig,
    load_config,
)
from megatron_lowbit.config.fields import dotted_keys
from megatron_lowbit.launch import STAGES
from megatron_lowbit.launch.bench.config import BenchmarkConfig
from megatron_lowbit.launch.help import WIDTH, explain_keys
from megatron_lowbit.launch.inputs import check_inputs
from megatron_lowbit.launch.layout import check_layout
from megatron_lowbit.runtime import launcher_env

BAD_INPUT = 2
CONFIGS: dict[str, type[StageConfig]] = {
    "demo": DemoConfig,
    "calibrate": CalibrateConfig,
    "quantize": QuantizeConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "serve": ServeConfig,
    "export": ExportConfig,
    "convert": ConvertConfig,
    "parity": ParityConfig,
    "benchmark": BenchmarkConfig,
}


def check_arguments(name: str, argv: list[str]) -> int | None:
    """Return the exit code after one line on standard error, where something is wrong with a stage's arguments; else
    None."""
    try:
        launcher_env.adopt()
        config, nproc = parse(name, CONFIGS[name], argv)
        check_layout(name, config, nproc)
        check_inputs(name, config)
    except LowBitError as error:
        return fail(str(error))
    return None


def fail(message: str) -> int:
    """Print one line on standard error, without control characters; returns the exit code."""
    rank = os.environ.get("RANK", "0")
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    line = f"megatron-lowbit: {'' if rank in ('', '0') else f'rank {rank}: '}{line}"
    print(line, file=sys.stderr, flush=True)
    _report_to_torchrun(line)
    return BAD_INPUT


def _report_to_torchrun(line: str) -> None:
    """Let torchrun's own report of the failure end with this line, where it else advises to enable tracebacks."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        record = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(file, "x") as report:  # the first line counts
            json.dump({"message": record}, report)


class Parser(argparse.ArgumentParser):
    """Reads a command's arguments; a slip is a LowBitError, and --help ends with the keys of the command's config, if
    it has one."""

    def __init__(self, *, prog: str, description: str, config: type[BaseModel] | None, unused: Collection[str] = ()):
        super().__init__(
            prog=prog, description=description, formatter_class=partial(argparse.HelpFormatter, width=WIDTH)
        )
        self.config, self.unused = config, unused

    def format_help(self) -> str:
        keys = "" if self.config is None else f"\n{explain_keys(self.config(), self.unused)}"
        return f"{super().format_help()}{keys}"

    def error(self, message: str) -> NoReturn:
        shown = message if len(message) <= 500 else f"{message[:480]} ..."
        raise LowBitError(f"{shown}{self._key_in(message)} (see {self.prog} --help)")

    def _key_in(self, message: str) -> str:
        """Return what to add where an unknown option is a key."""
        option = re.search(r"unrecognized arguments: --([\w.-]+)", message)
        if option is None or self.config is None:
            return ""
        name = option[1].replace("-", "_")
        key = next((key for key in dotted_keys(self.config) if name in (key, key.rpartition(".")[2])), None)
        return f"; keys have no dashes before them: {key}=VALUE" if key else ""


def parse(name: str, config_class: type[StageConfig], argv: list[str]) -> tuple[StageConfig, int | None]:
    parser = Parser(
        prog=f"megatron-lowbit {name}",
        description=STAGES[name],
        config=config_class,
    )
    parser.add_argument("--config", help="YAML file of config keys")
    parser.add_argument("--model", help="same as model=...")
    parser.add_argument("--output-dir", help="same as output_dir=...")
    parser.add_argument("--engine", help="huggingface, deepspeed or megatron; same as engine=...")
    parser.add_argument("--wandb", help="off, offline or online; same as wandb=...")
    parser.add_argument("--nproc", type=int, help="ranks to start outside a launcher; must equal tp x pp x dp")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it
    flags = [
        flag for flag in ("ablation", "comm_ablation", "token_ablation", "dry_run") if flag in config_class.model_fields
    ]
    for flag in flags:
        parser.add_argument(f"--{flag.replace('_', '-')}", action="store_true", help=f"same as {flag}=true")
    if "experiment" in config_class.model_fields:
        parser.add_argument("--experiment", help="lowbit_comm or qllm; same as experiment=...")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args(argv)
    named = [
        f"{key}={value}"
        for key in ("model", "engine", "output_dir", "wandb", "experiment")
        if (value := getattr(args, key, None)) is not None
    ]
    named += [f"{flag}=true" for flag in flags if getattr(args, flag)]
    return load_config(config_class, args.config, [*args.overrides, *named]), args.nproc
