"""What every stage shares: arguments, its own ranks outside a launcher, result files, exit codes.

A stage is a module of this package with CONFIG, its config class, and run(config, logger) -> {"rows": [...], ...}.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from importlib import import_module
from typing import Any, NoReturn

import torch
import yaml

from megatron_lowbit import launcher_env, preemption, presence
from megatron_lowbit.config import LowBitError, StageConfig, defaults, load_config, one_line
from megatron_lowbit.distributed import ToldError, env_rank, env_world_size, launched, on_every_rank, on_rank_zero
from megatron_lowbit.files import ensure_writable, write_json, write_text
from megatron_lowbit.folder_lock import FolderLock
from megatron_lowbit.launch import STAGES
from megatron_lowbit.launch.netlab import FIRST_HOST, network, no_namespaces
from megatron_lowbit.metrics import MetricLogger, environment, require
from megatron_lowbit.preemption import REQUEUE, Preempted
from megatron_lowbit.rendezvous import join
from megatron_lowbit.temporary import scratch_folder

BAD_INPUT = 2


def fail(message: str) -> int:
    """Print one line on standard error; returns the exit code."""
    rank = f"rank {env_rank()}: " if env_rank() else ""
    line = f"megatron-lowbit: {rank}{' '.join(message.split())}"
    print(line, file=sys.stderr, flush=True)
    _tell_torchrun(line)
    return BAD_INPUT


def _tell_torchrun(line: str) -> None:
    """Let torchrun's own report of the failure end with this line, where it else advises to enable tracebacks."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        record = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(file, "x") as report:  # the first line counts
            json.dump({"message": record}, report)


def run_stage(name: str, argv: list[str]) -> int:
    """Parse, start ranks if this process is to be more than one, run, write <output_dir>/<stage>.json."""
    try:
        launcher_env.adopt()
        stage = import_module(f"megatron_lowbit.launch.{name}")
        config, nproc = parse(name, stage.CONFIG, argv)
        if config.wandb != "off":
            require("wandb", "wandb")
        own = stage.ranks(config) if hasattr(stage, "ranks") else None
        if own is not None:
            check_own(name, own, env_world_size() if launched() else nproc or own)
            if launched() or own == 1:
                return run_rank(name, stage, config)
            ensure_writable(config.output_dir)
            return _start_ranks(name, argv, own)
        if launched():
            check_world(config, env_world_size())
            return run_rank(name, stage, config)
        if config.engine == "huggingface":
            check_world(config, nproc or 1)
            return run_rank(name, stage, config)
        check_world(config, nproc or world_of(config))
        ensure_writable(config.output_dir)
        return _start_ranks(name, argv, world_of(config), getattr(config, "rate", None))
    except LowBitError as error:
        return fail(str(error))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LowBitError(f"{message} (see {self.prog} --help)")


def parse(name: str, config_class: type[StageConfig], argv: list[str]) -> tuple[StageConfig, int | None]:
    keys = "\n".join(f"  {key}={'none' if value is None else value}" for key, value in defaults(config_class()).items())
    parser = Parser(
        prog=f"megatron-lowbit {name}",
        description=STAGES[name],
        epilog=f"config keys and their defaults (explained in {config_class.__module__}):\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    flags = [flag for flag in ("ablation", "comm_ablation", "dry_run") if flag in config_class.model_fields]
    for flag in flags:
        parser.add_argument(f"--{flag.replace('_', '-')}", action="store_true", help=f"same as {flag}=true")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args(argv)
    named = [
        f"{key}={value}"
        for key in ("model", "engine", "output_dir", "wandb")
        if (value := getattr(args, key)) is not None
    ]
    named += [f"{flag}=true" for flag in flags if getattr(args, flag)]
    return load_config(config_class, args.config, [*args.overrides, *named]), args.nproc


def check_alone(command: str) -> None:
    """For a command that is one process. Raises LowBitError where a launcher has started several."""
    launch = launcher_env.adopt()
    if launch is not None and launch.world_size > 1:
        raise LowBitError(
            f"{command} is one process, which starts the ranks it needs, but a launcher has started "
            f"{launch.world_size}: run it without one (in a Slurm job: by itself or with srun -n1)"
        )


def check_own(name: str, own: int, world: int) -> None:
    """For a stage that says how many processes it runs in (its `ranks`)."""
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
    """{key: size} of the kinds of parallelism in use; tp always."""
    sizes = {"tp": config.tp, "pp": config.pp, "dp": getattr(config, "dp", 1)}
    return {key: size for key, size in sizes.items() if key == "tp" or size > 1}


def world_of(config: StageConfig) -> int:
    """Processes that a stage runs in."""
    return math.prod(_sizes(config).values())


def run_rank(name: str, stage: Any, config: StageConfig) -> int:
    """One rank's whole life."""
    _quiet()
    rank, logger, code = env_rank(), None, 1
    start, lock = time.perf_counter(), FolderLock(config.output_dir)
    try:
        if launched():
            join()
        output = on_every_rank(lambda: ensure_writable(config.output_dir))
        on_rank_zero(lock.take)
        resolved = config.model_dump(mode="json")
        logger = MetricLogger(output, name, resolved, config.wandb, rank)
        results = stage.run(config, logger)
        if rank == 0:
            seconds = time.perf_counter() - start
            write_text(output / f"{name}.yaml", yaml.safe_dump(resolved, sort_keys=False))
            record = {"config": resolved, **results, "seconds": seconds, "environment": environment()}
            write_json(output / f"{name}.json", record)
            logger.summary(seconds=seconds, rows=results["rows"])
        code = 0
    except ToldError:
        code = BAD_INPUT
    except LowBitError as error:
        code = fail(str(error))
    except RuntimeError as error:
        if not _of_a_collective(error):
            raise
        who = presence.suspects() or "another rank has ended"
        fail(f"a collective failed: {who}; see what it says ({one_line(error)})")
    except SystemExit as ended:  # SIGINT, or a second SIGTERM
        code = int(ended.code or 0)
        raise
    except Preempted as stop:
        code = REQUEUE
        if rank == 0:
            why = preemption.received[0].name if preemption.received else "another rank's signal"
            print(f"megatron-lowbit: stopped by {why}: {stop}", file=sys.stderr, flush=True)
    finally:
        with contextlib.ExitStack() as leaving:  # all of it, whatever one of them raises
            leaving.callback(lock.release)
            leaving.callback(_leave_groups, code)
            if logger is not None:
                leaving.callback(logger.close, code)
    return code


def _of_a_collective(error: RuntimeError) -> bool:
    from torch import distributed as dist

    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _leave_groups(code: int) -> None:
    """Without this a rank ends with SIGABRT. Ranks meet first where all leave: after an error a peer may be gone."""
    from torch import distributed as dist

    presence.stop()
    if dist.is_initialized():
        try:
            if code in (0, REQUEUE):
                dist.barrier()
        finally:
            dist.destroy_process_group()


def _quiet() -> None:
    """Frameworks announce themselves at length; errors still come through."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")  # what it falls back from
    for name in ("DeepSpeed", "transformers", "torch.distributed", "megatron.core"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs errors that it raises too
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it found nothing better
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _start_ranks(name: str, argv: list[str], size: int, rate: str | None = None) -> int:
    """Run the stage in `size` processes on this machine; the first failure ends the others. Rank 0 speaks for all.

    rate: of the link between them (netlab.py), None for loopback.
    """
    if rate is not None and (reason := no_namespaces()):
        raise LowBitError(f"rate={rate} {reason}; leave rate out to measure on loopback")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // size))
    base = {"OMP_NUM_THREADS": threads, "PYTHONSAFEPATH": "1", **launcher_env.without_launch(os.environ)}
    if 0 < torch.cuda.device_count() < size:
        print(f"{size} ranks, {torch.cuda.device_count()} GPUs: running on the CPU", file=sys.stderr)
        base |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    base |= {"WORLD_SIZE": str(size), "MASTER_ADDR": FIRST_HOST if rate else "127.0.0.1", "MASTER_PORT": str(port)}
    base = preemption.child_of(base)
    command = [sys.executable, "-m", f"megatron_lowbit.launch.{name}", *argv]
    with scratch_folder() as logs, network(rate, size) as host:
        ranks: list[subprocess.Popen[bytes]] = []
        # A rank holds back the signals that it inherits as blocked, until it has handlers for them.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, preemption.HELD_BACK)
        try:
            for rank in range(size):
                environ = {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                with open(logs / str(rank), "wb") as log:
                    to = None if rank == 0 else log
                    ranks.append(subprocess.Popen([*host[rank], *command], env=environ, stderr=to, stdout=to))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        failed = _wait(ranks)
        if failed:  # rank 0 printed its own error; of the others the first that failed by itself is shown
            print((logs / str(failed)).read_text(errors="replace"), end="", file=sys.stderr)
    code = ranks[failed or 0].returncode
    return code if code >= 0 else 1


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all ranks, and pass signals on to them; after a failure the others get ten seconds. Returns the rank to
    blame, if any."""
    blamed: int | None = None
    told = 0
    deadline: float | None = None
    try:
        while any(rank.poll() is None for rank in ranks):
            for number in preemption.received[told:]:
                told += 1
                for rank in ranks:
                    rank.send_signal(number)
            codes = [rank.poll() for rank in ranks]
            if deadline is None and any(codes):
                deadline = time.monotonic() + 10
            if blamed is None and any(codes):
                blamed = next(i for i, code in enumerate(codes) if code)
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.05)
    except SystemExit:  # SIGINT, which a terminal sends to the ranks too
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        raise
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.terminate()
        for rank in ranks:
            try:
                rank.wait(5)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
    if ranks[0].returncode == BAD_INPUT:  # all ranks met the same bad input, and rank 0 has said so
        return 0
    return blamed if blamed is not None else next((i for i, rank in enumerate(ranks) if rank.returncode), None)
