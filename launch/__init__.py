"""Commands: `megatron-lowbit COMMAND [--config FILE] [key.path=value ...]`, each stage also as
`python -m megatron_lowbit.launch.COMMAND` for launchers. Exit codes: 0 done; 2 bad input; 99 stopped by SIGUSR1 or
SIGTERM, to be run again.
"""

from __future__ import annotations

import os
import sys
import textwrap
from importlib import import_module, metadata

import megatron_lowbit
from megatron_lowbit.runtime import preemption

if sys.argv[:1] == ["-m"]:  # Python is on its way to a stage of ours: no signal may find us without a handler
    preemption.install()
STAGES = {
    "demo": "the whole pipeline on the embedded model, two ranks, no network",
    "calibrate": "measure the ranges of all partial sums; writes communication plans",
    "quantize": "quantize the weights; writes an artifact (with communication plans, given calibration.data)",
    "evaluate": "perplexity, KL divergence, SQNR and bytes on the wire",
    "generate": "continue prompts",
    "serve": "an HTTP server with OpenAI's interface: completions, chat, metrics",
    "export": "an artifact as a model folder that transformers loads without this package",
    "convert": "Hugging Face folder or artifact to a checkpoint that Megatron-LM's scripts load, and back",
    "parity": "one artifact on every engine and tensor-parallel size: logits and tokens compared",
    "report": "one HTML page of a run, or of several side by side: `report RUN [RUN ...] [--output FILE]`",
    "slurm": "commands as jobs of a Slurm cluster: `slurm render FILE` writes the scripts, `slurm submit` sends them",
    "benchmark": "time patched against unpatched; `benchmark collectives|kernels|linear|model|gpu`: these alone",
}
WITHOUT_CONFIG = ("report", "slurm")  # they run no model, and read their arguments themselves
SLEEPING = ("calibrate", "quantize", "evaluate", "serve")  # whole texts; and beside clients, who need the cores too
BENCHMARKS = ("collectives", "kernels", "linear", "model", "gpu")  # kinds of `benchmark` that are one process


VERSION = ("-V", "--version")


def main(argv: list[str] | None = None) -> int:
    """Run the `megatron-lowbit` command; returns its exit code."""
    before = preemption.install()
    try:
        return _main(argv)
    finally:
        if argv is not None:  # else the process ends here, and a late signal is not to change its exit code
            preemption.restore(before)


def _main(argv: list[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, STAGES))
        print("usage: megatron-lowbit COMMAND [options] [key.path=value ...]\n")
        for name, what in STAGES.items():
            print(textwrap.fill(what, 80, initial_indent=f"  {name:{width}}  ", subsequent_indent=" " * (width + 4)))
        print("\nmegatron-lowbit COMMAND --help lists its keys; --version tells the version")
        return 0
    if argv[0] in VERSION:
        print(f"megatron-lowbit {version()}")
        return 0
    if argv[0] == "benchmark" and argv[1:2] and argv[1] in BENCHMARKS:
        from megatron_lowbit.launch.bench import arguments

        code = arguments.check_arguments(argv[1], argv[2:])
        return import_module(f"megatron_lowbit.launch.bench.{argv[1]}").main(argv[2:]) if code is None else code
    if argv[0] == "benchmark" and argv[1:2] and "=" not in argv[1] and not argv[1].startswith("-"):
        from megatron_lowbit.config.errors import shown, suggest
        from megatron_lowbit.launch.arguments import fail

        return fail(f"unknown benchmark {shown(argv[1])}{suggest(argv[1], BENCHMARKS)}")
    if argv[0] == "slurm":
        from megatron_lowbit.launch.slurm import render as slurm

        return slurm.main(argv[1:])
    if argv[0] == "report":
        from megatron_lowbit.launch import report

        return report.main(argv[1:])
    from megatron_lowbit.config.errors import shown, suggest
    from megatron_lowbit.launch.arguments import check_arguments, fail

    if argv[0] not in STAGES:
        return fail(f"unknown command {shown(argv[0])}{suggest(argv[0], STAGES)}")
    code = check_arguments(argv[0], argv[1:])
    if code is not None:
        return code
    _sleep_between_products(argv[0])
    from megatron_lowbit.launch.runner import run_stage  # and with it torch

    return run_stage(argv[0], argv[1:])


def _sleep_between_products(stage: str) -> None:
    """Have OpenMP's threads sleep while they wait, unless the user has a policy; read once, when torch is imported.

    By default they spin for milliseconds after every product. On cores that other processes use, they spin until the
    thread that they wait for is given its turn: twenty times the time on two busy cores.
    """
    if stage in SLEEPING and "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def version() -> str:
    """Return the version that is installed; of a bare checkout, the source's own."""
    try:
        return metadata.version("megatron-lowbit")
    except metadata.PackageNotFoundError:
        return megatron_lowbit.__version__


def _on_the_way() -> None:
    """Check a stage's arguments before `python -m megatron_lowbit.launch.STAGE` imports its module, and torch."""
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
    stage = module.removeprefix(f"{__name__}.")
    if stage in STAGES and stage not in WITHOUT_CONFIG and module != stage:
        from megatron_lowbit.launch.arguments import check_arguments

        code = check_arguments(stage, sys.argv[1:])
        if code is not None:
            raise SystemExit(code)
        _sleep_between_products(stage)


if sys.argv[:1] == ["-m"]:
    _on_the_way()
