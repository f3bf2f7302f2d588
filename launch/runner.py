"""What every stage shares: arguments, its own ranks outside a launcher, result files, exit codes.

A stage is a module of this package with CONFIG, its config class, and run(config, logger) -> {"rows": [...], ...}.
What can be told of its arguments without torch is told by arguments.py, layout.py and inputs.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_lowbit.config import NOTICED, LowBitError, StageConfig, one_line
from megatron_lowbit.io.files import discard, ensure_writable, missing_folders, remove_empty, write_json, write_text
from megatron_lowbit.launch.arguments import BAD_INPUT, fail, parse
from megatron_lowbit.launch.bench.netlab import FIRST_HOST, network, no_namespaces
from megatron_lowbit.launch.ending import tell_ending
from megatron_lowbit.launch.fitting import check_fitting
from megatron_lowbit.launch.inputs import check_inputs
from megatron_lowbit.launch.layout import check_layout, world_of
from megatron_lowbit.launch.report import PAGE
from megatron_lowbit.runtime import launcher_env, preemption, presence
from megatron_lowbit.runtime.distributed import PeerError, on_every_rank, on_rank_zero
from megatron_lowbit.runtime.folder_lock import FolderLock
from megatron_lowbit.runtime.launcher_env import env_rank, launched
from megatron_lowbit.runtime.metrics import MetricLogger, environment
from megatron_lowbit.runtime.preemption import REQUEUE, Preempted
from megatron_lowbit.runtime.rendezvous import join
from megatron_lowbit.temporary import scratch_folder


def run_stage(name: str, argv: list[str]) -> int:
    """Parse, start ranks if this process is to be more than one, run, write <output_dir>/<stage>.json."""
    try:
        launcher_env.adopt()
        stage = import_module(f"megatron_lowbit.launch.{name}")
        config, nproc = parse(name, stage.CONFIG, argv)
        own = check_layout(name, config, nproc)
        check_inputs(name, config)
        if not launched():
            check_fitting(name, config)
        if launched() or own == 1 or (own is None and config.engine == "huggingface"):
            return run_rank(name, stage, config)
        new = missing_folders(config.output_dir)
        ensure_writable(config.output_dir)
        code = start_ranks(name, argv, own or world_of(config), getattr(config, "rate", None))
        if code == BAD_INPUT:
            remove_empty(new)
        return code
    except LowBitError as error:
        return fail(str(error))


def perform(name: str, stage: Any, config: StageConfig) -> dict[str, Any]:
    """Run a stage on one rank; return what <output_dir>/<stage>.json holds, on ranks other than 0 what the stage
    returned."""
    rank, logger, code = env_rank(), None, 1
    start, lock = time.perf_counter(), FolderLock(config.output_dir)
    new = missing_folders(config.output_dir) if rank == 0 else []
    try:
        if launched():
            join()
        output = on_every_rank(lambda: ensure_writable(config.output_dir))
        on_rank_zero(lock.take)
        resolved = config.model_dump(mode="json")
        logger = MetricLogger(output, name, resolved, config.wandb, rank)
        record: dict[str, Any] = stage.run(config, logger)
        if rank == 0:
            seconds = time.perf_counter() - start
            write_text(output / f"{name}.yaml", yaml.safe_dump(resolved, sort_keys=False))
            about = {"data": logger.data, "seconds": seconds, "environment": environment()}
            record = {"config": resolved, **record, **about}
            write_json(output / f"{name}.json", record)
            if page := make_page(output):
                logger.page(page)
            logger.summary(seconds=seconds, rows=record["rows"])
        code = 0
    except (PeerError, LowBitError):
        code = BAD_INPUT
        raise
    except Preempted:
        code = REQUEUE
        raise
    except SystemExit as ended:
        code = int(ended.code or 0)
        raise
    finally:
        with contextlib.ExitStack() as leaving:  # all of it, whatever one of them raises
            if code == BAD_INPUT:
                leaving.callback(remove_empty, [Path(config.output_dir) / "resume", *new])
            leaving.callback(lock.release)
            if logger is not None:
                leaving.callback(logger.close, code, code == BAD_INPUT)
    return record


def make_page(output: Path) -> Path | None:
    """Write the page of a folder; what is wrong is told and no more: the stage's results are there."""
    page = output / PAGE
    try:
        from megatron_lowbit.launch.page.build import write_page

        write_page([output], page)
        return page
    except LowBitError as error:  # of another stage's results in this folder
        print(f"megatron-lowbit: no {PAGE}: {error}", file=sys.stderr)
    except Exception as error:
        warnings.warn(f"no {PAGE}: {type(error).__name__}: {error}", stacklevel=2)  # which the tests take for an error
    discard(page)  # of an earlier run: it does not tell of these results
    return None


def run_rank(name: str, stage: Any, config: StageConfig) -> int:
    """Run a stage on one rank, from the first import to the exit code."""
    quiet()
    code = 1
    try:
        record = perform(name, stage, config)
        if env_rank() == 0:
            tell_ending(name, config, record)
        code = 0
    except PeerError:
        code = BAD_INPUT
    except LowBitError as error:
        code = fail(str(error))
    except RuntimeError as error:
        if not of_a_collective(error):
            raise
        who = presence.suspects() or "another rank has ended"
        fail(f"a collective failed: {who}; see what it says ({one_line(error)})")
    except SystemExit as ended:  # SIGINT, or a second SIGTERM
        code = int(ended.code or 0)
        raise
    except Preempted as stop:
        code = REQUEUE
        if env_rank() == 0:
            why = preemption.received[0].name if preemption.received else "another rank's signal"
            print(f"megatron-lowbit: stopped by {why}: {stop}", file=sys.stderr, flush=True)
    finally:
        leave_groups(code)
    return code


def of_a_collective(error: RuntimeError) -> bool:
    """Tell whether a collective has failed, as it does when another rank has ended."""
    from torch import distributed as dist

    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def leave_groups(code: int) -> None:
    """Leave the process groups: without this a rank ends with SIGABRT. Ranks meet first where all leave: after an error
    a peer may be gone."""
    from torch import distributed as dist

    presence.stop()
    if dist.is_initialized():
        try:
            if code in (0, REQUEUE):
                dist.barrier()
        finally:
            dist.destroy_process_group()


def quiet() -> None:
    """Silence frameworks that announce themselves at length; errors still come through."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")  # what it falls back from
    for name in ("DeepSpeed", "transformers", "torch.distributed", "megatron.core"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs errors that it raises too
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it found nothing better
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


PATIENCE = 10.0  # seconds that the other ranks get to end by themselves after one has failed
GRACE = 5.0  # seconds between SIGTERM and SIGKILL for those that have not


def start_ranks(name: str, argv: list[str], size: int, rate: str | None = None) -> int:
    """Run the stage in `size` processes on this machine; the first failure ends the others. Rank 0 speaks for all.

    rate: of the link between them (netlab.py), None for loopback.
    """
    if rate is not None and (reason := no_namespaces()):
        raise LowBitError(f"rate={rate} {reason}; leave rate out to measure on loopback")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // size))
    base = {"OMP_NUM_THREADS": threads, "PYTHONSAFEPATH": "1", NOTICED: "1", **launcher_env.without_launch(os.environ)}
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
    """Wait for all ranks, and pass signals on to them; after a failure the others get PATIENCE. Returns the rank to
    blame, if any."""
    blamed: int | None = None
    forwarded = 0
    deadline: float | None = None
    try:
        while any(rank.poll() is None for rank in ranks):
            for number in preemption.received[forwarded:]:
                forwarded += 1
                for rank in ranks:
                    rank.send_signal(number)
            codes = [rank.poll() for rank in ranks]
            if deadline is None and any(codes):
                deadline = time.monotonic() + PATIENCE
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
                rank.wait(GRACE)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
    if ranks[0].returncode == BAD_INPUT:  # all ranks met the same bad input, and rank 0 has said so
        return 0
    return blamed if blamed is not None else next((i for i, rank in enumerate(ranks) if rank.returncode), None)
