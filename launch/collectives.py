"""megatron-lowbit benchmark collectives: seconds of an all-reduce of [tokens, 1024], in every way, side by side.

Real processes over gloo, on loopback or, with `rate`, each in a network namespace behind a link of that rate
(netlab.sh). One set of processes per number of ranks measures all sizes. In each cell (ranks, size) the algorithms take
turns, so a machine whose speed drifts moves all of them; a repetition starts after a barrier and takes as long as it
does on the slowest rank.

    bits_per_value   what one rank hands to torch.distributed, over all hops of one all-reduce
    link_bytes       what one rank has to send or receive, whichever is more. N ranks, m bytes handed over:
                     ring (bf16, fp32, exact_sum) 2 (N - 1) / N m;  one_shot (N - 1) m;
                     two hops (two_shot, group32) N - 1 stripes of its own in each
    ideal_seconds    8 link_bytes / rate, headers of packets not counted. No algorithm of these bytes is faster, but for
                     the 64 KiB of the link's bucket, which pass at once: small cells show latency, not rate
    mode             of our collectives; of auto, the one that it takes at this size
    sqnr_db          of the result against the float32 sum of the ranks' bf16 values; 300: no difference. It shows that
                     the sums are right, not how models fare: these partial sums have tokens that are all alike, which
                     suits static ranges, and neighbours of unlike widths, which does not suit groups
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.artifacts import SitePlan
from megatron_lowbit.collectives import LOW_BIT, HybridReducer
from megatron_lowbit.config import (
    BenchmarkCollectivesConfig,
    CommConfig,
    CommMode,
    LowBitError,
    StageConfig,
    load_config,
)
from megatron_lowbit.config import defaults as defaults_of
from megatron_lowbit.cost import CostTable
from megatron_lowbit.distributed import launched
from megatron_lowbit.evaluate import sqnr_db
from megatron_lowbit.files import write_json
from megatron_lowbit.launch import runner
from megatron_lowbit.launch.peers import GroupInt4, StockAllReduce
from megatron_lowbit.metrics import MetricLogger, progress, require
from megatron_lowbit.ranges import synthetic_plan
from megatron_lowbit.tuning import measure_costs

CONFIG = BenchmarkCollectivesConfig
FEATURES = 1024
CALIBRATION_TOKENS = 512
LEAST_ROUNDS = 3
STARTUP_SECONDS = 180  # 64 processes import torch, and kernels are compiled, on two cores
NETLAB = Path(__file__).with_name("netlab.sh")
SHARED_KEYS = ("seed", "output_dir", "wandb")  # of those that all commands have
UNUSED = [key for key in StageConfig.model_fields if key not in SHARED_KEYS]
UNUSED += [
    "comm.mode",
    "comm.cost_table",
    "comm.drift_threshold",
    "comm.selection",
    "comm.gather",
    "comm.tp_sizes",
]


# The command


def main(argv: list[str]) -> int:
    """`megatron-lowbit benchmark collectives ARGV`; the exit code."""
    # Through all `finally`s, which end the ranks and remove the namespaces.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        config = parse(argv)
        if config.wandb != "off":
            require("wandb", "wandb")
        return runner._run("benchmark", sys.modules[__name__], config)
    except LowBitError as error:
        return runner.fail(str(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(argv: list[str]) -> BenchmarkCollectivesConfig:
    keys = [
        f"  {key}={'none' if value is None else value}"
        for key, value in defaults_of(CONFIG()).items()
        if key not in UNUSED
    ]
    parser = runner._Parser(
        prog="megatron-lowbit benchmark collectives",
        description="time all-reduces over real processes, on loopback or behind links of a given rate",
        epilog="config keys and their defaults (explained in megatron_lowbit/config.py):\n" + "\n".join(keys),
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    config = load_config(CONFIG, file, [*overrides, *(f"{key}={v}" for key, v in args.items() if v is not None)])
    _refuse_unused(config)
    if config.rate is not None and (reason := no_namespaces()):
        raise LowBitError(f"rate={config.rate} {reason}; leave rate out to measure on loopback")
    if launched():
        raise LowBitError("benchmark collectives starts its own ranks; run it without a launcher")
    return config


def _refuse_unused(config: BenchmarkCollectivesConfig) -> None:
    """A key that changes nothing is an error, not a surprise in the figures."""
    comm = {f"comm.{key}": default for key, default in defaults_of(CommConfig()).items()}
    usual, given = {**defaults_of(StageConfig()), **comm}, defaults_of(config)
    for key in UNUSED:
        if given[key] != usual[key]:
            other = "set algorithms=" if key == "comm.mode" else "leave it out"
            raise LowBitError(f"{key}={given[key]} changes nothing here, where no model runs; {other}")


def run(config: BenchmarkCollectivesConfig, logger: MetricLogger) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    cells = [(ranks, size) for ranks in config.ranks for size in config.sizes]
    measured = (cell for ranks in config.ranks for cell in measure(config, ranks))
    for (ranks, size), cell in zip(progress(cells, len(cells), "timing"), measured, strict=True):
        rows += cell
        logger.log(ranks=ranks, bytes=size, **{f"{row['algorithm']}_seconds": row["seconds"] for row in cell})
    print_table(config, rows)
    if config.tune:
        print_choices(config)
    try:
        plot(rows, Path(config.output_dir) / "collectives.png")
    except LowBitError as error:
        print(f"megatron-lowbit: no collectives.png: {error}", file=sys.stderr)
    return {"rows": rows}


# The processes


def measure(config: BenchmarkCollectivesConfig, ranks: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of each of `sizes`, in order, as they are done. Whatever happens, no rank and no namespace is left."""
    with (
        tempfile.TemporaryDirectory(prefix="lowbit-") as folder,
        network(config.rate, ranks) as host,
        started(config, ranks, Path(folder), host) as workers,
    ):
        for number, size in enumerate(config.sizes):
            deadline = (
                time.monotonic() + cell_limit(config, ranks, size) + (0 if number else start_limit(config, ranks))
            )
            result = Path(folder) / f"{number}.json"
            while not result.exists():
                _raise_if_failed(workers, Path(folder))
                if time.monotonic() > deadline:
                    raise LowBitError(
                        f"ranks={ranks} sizes={size} did not finish in time; set a smaller size, a lower cell_seconds "
                        "or a higher rate"
                    )
                time.sleep(0.02)
            yield json.loads(result.read_text())["rows"]


@contextlib.contextmanager
def network(rate: str | None, ranks: int) -> Iterator[list[list[str]]]:
    """What a command line has to start with to run on the host of each rank."""
    if rate is None:
        yield [[]] * ranks
        return
    try:
        made = netlab("up", str(ranks), rate)
        if made.returncode:
            reason = " ".join((made.stderr.strip().splitlines() or ["netlab.sh failed"])[-1].split())
            raise LowBitError(
                f"rate={rate}: cannot make network namespaces ({reason}); leave rate out to measure on loopback"
            )
        yield [["bash", str(NETLAB), "run", str(rank)] for rank in range(ranks)]
    finally:
        with uninterrupted():
            netlab("down")


def netlab(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run netlab.sh in a session of its own, so that Ctrl-C reaches this process only."""
    return subprocess.run(
        ["bash", str(NETLAB), *arguments],
        env={**os.environ, "NETLAB_NAME": f"lowbit-{os.getpid()}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        start_new_session=True,
    )


def no_namespaces() -> str | None:
    """Why this process cannot make network namespaces, as far as can be seen without trying."""
    missing = [tool for tool in ("bash", "ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)} (Debian and Ubuntu: the packages bash and iproute2)"
    return "needs root, for one network namespace per rank" if os.geteuid() != 0 else None


@contextlib.contextmanager
def started(
    config: BenchmarkCollectivesConfig, ranks: int, folder: Path, host: list[list[str]]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The worker processes; they are killed at the end. Rank r's output goes to <folder>/r.log."""
    environ = {**os.environ, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": "", "NETLAB_NAME": f"lowbit-{os.getpid()}"}
    environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    command = [
        sys.executable,
        "-m",
        "megatron_lowbit.launch.collectives",
        "worker",
        str(ranks),
        str(folder),
        config.model_dump_json(),
    ]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            with open(folder / f"{rank}.log", "wb") as log:
                workers.append(
                    subprocess.Popen(
                        [*host[rank], *command, str(rank)],
                        env=environ,
                        stdin=subprocess.PIPE,  # its end tells a worker that this process is gone
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        yield workers
    finally:
        with uninterrupted():
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.communicate()


def _raise_if_failed(workers: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """A rank that ended before its time: its last line as a LowBitError if it was bad input, else all it said."""
    failed = [rank for rank, worker in enumerate(workers) if worker.poll()]
    if not failed:
        return
    log = (folder / f"{failed[0]}.log").read_text(errors="replace").strip()
    if workers[failed[0]].returncode == runner.BAD_INPUT:
        raise LowBitError(log.splitlines()[-1].removeprefix("megatron-lowbit: ") if log else "a rank failed")
    raise RuntimeError(f"rank {failed[0]} of {len(workers)} ended with code {workers[failed[0]].returncode}:\n{log}")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: a second one must not cut the clearing up short."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def cell_limit(config: BenchmarkCollectivesConfig, ranks: int, size: int) -> float:
    """Seconds after which a cell has hung, generously: float32 in a ring is the slowest, and cores are shared."""
    speed = 1e8 if config.rate is None else min(1e8, bits_per_second(config.rate) / 8)
    slowest = 2 * 2 * size / speed + 0.01 * ranks
    return 60 + 3 * config.cell_seconds + 5 * (LEAST_ROUNDS + 2) * len(config.algorithms) * slowest


def start_limit(config: BenchmarkCollectivesConfig, ranks: int) -> float:
    """Seconds before the first cell: imports, and the table that auto goes by."""
    tuning = sum(cell_limit(config, ranks, size) for size in config.sizes) if "auto" in config.algorithms else 0
    return STARTUP_SECONDS + tuning


# One rank


def work(ranks: int, folder: Path, config: BenchmarkCollectivesConfig, rank: int) -> None:
    """A worker's life: measure all sizes; rank 0 writes <folder>/<number of the size>.json."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    limit = start_limit(config, ranks) + max(cell_limit(config, ranks, size) for size in config.sizes)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",  # needs no port, and nothing of the link
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=limit),
    )
    group = dist.group.WORLD
    assert group is not None
    costs = None
    if "auto" in config.algorithms:
        costs = measure_costs(group, calibrated(config, ranks, FEATURES), config.sizes)
        if config.tune and rank == 0:
            costs.save(cost_file(config, ranks))
    for number, size in enumerate(config.sizes):
        rows = measure_cell(config, size, group, costs)
        if rank == 0:
            write_json(folder / f"{number}.json", {"rows": rows})
    dist.destroy_process_group()


@torch.inference_mode()
def measure_cell(
    config: BenchmarkCollectivesConfig, size: int, group: dist.ProcessGroup, costs: CostTable | None = None
) -> list[dict[str, Any]]:
    """One row per algorithm; the same on all ranks but for sqnr_db, which rank 0 measures."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    features = min(FEATURES, size // 2)
    tokens = size // 2 // features
    plan = calibrated(config, ranks, features)
    x = partial_sums(config.seed, rank, tokens, features)
    inputs: dict[str, Tensor] = {name: x.float() if name == "fp32" else x for name in config.algorithms}
    algorithms: dict[str, Any] = {name: algorithm(name, plan, group, costs) for name in config.algorithms}
    reference = None
    if rank == 0:
        reference = x.float()
        for other in range(1, ranks):
            reference += partial_sums(config.seed, other, tokens, features).float()
    rows = []
    for name, reducer in algorithms.items():
        result = reducer.all_reduce(inputs[name].clone())
        if name in LOW_BIT:
            _check_equal(name, result, group)
        bits, handed = reducer.traffic.bits_per_value, reducer.traffic.bytes
        mode = reducer.chosen(x.numel()) if isinstance(reducer, HybridReducer) else None
        link = link_bytes(reducer, mode, ranks, tokens, handed)
        rows.append(
            {
                "name": f"{name}, {ranks} ranks, {size_text(size)}",
                "ranks": ranks,
                "bytes": size,
                "rate": config.rate,
                "algorithm": name,
                "mode": mode,
                "bits_per_value": bits,
                "link_bytes": link,
                "ideal_seconds": None if config.rate is None else 8 * link / bits_per_second(config.rate),
                "sqnr_db": None if reference is None else _sqnr(reference, result),
            }
        )
    seconds = time_rounds(config, inputs, algorithms, group)
    for row in rows:
        repetitions = seconds[row["algorithm"]]
        row |= {"seconds": statistics.median(repetitions), "repetitions": repetitions}
    return rows


def time_rounds(
    config: BenchmarkCollectivesConfig, inputs: dict[str, Tensor], algorithms: dict[str, Any], group: dist.ProcessGroup
) -> dict[str, list[float]]:
    """{algorithm: seconds of each repetition, of the slowest rank}."""
    names = list(algorithms)

    def one_round(number: int) -> list[float]:
        seconds = dict.fromkeys(names, 0.0)
        first = number % len(names)  # nobody always follows the same algorithm's backlog
        for name in names[first:] + names[:first]:
            own = inputs[name].clone()  # stock all-reduces work in place
            dist.barrier(group)
            start = time.perf_counter()
            algorithms[name].all_reduce(own)
            seconds[name] = time.perf_counter() - start
        return list(seconds.values())

    def slowest(rounds: list[list[float]]) -> Tensor:
        """float64 [rounds, algorithms], the same on all ranks."""
        times = torch.tensor(rounds, dtype=torch.float64)
        dist.all_reduce(times, dist.ReduceOp.MAX, group)
        return times

    # The check of the results has warmed up once. How often to repeat is decided once, for all ranks alike.
    expected = slowest([one_round(0)]).sum().item()
    count = min(config.repeats, max(LEAST_ROUNDS, int(config.cell_seconds / expected)))
    times = slowest([one_round(number) for number in range(count)])
    return dict(zip(names, times.t().tolist(), strict=True))


def calibrated(config: BenchmarkCollectivesConfig, ranks: int, features: int) -> SitePlan:
    """The plan of partial sums like those that are sent."""
    sample = [partial_sums(config.seed + 1, r, CALIBRATION_TOKENS, features).float() for r in range(ranks)]
    return synthetic_plan(torch.stack(sample), config.comm)


def cost_file(config: BenchmarkCollectivesConfig, ranks: int) -> Path:
    return Path(config.output_dir) / f"costs-tp{ranks}.json"


def algorithm(name: str, plan: SitePlan, group: dist.ProcessGroup, costs: CostTable | None) -> Any:
    """An object with all_reduce(x) and traffic."""
    if name in ("bf16", "fp32"):
        return StockAllReduce(group)
    if name == "group32":
        return GroupInt4(group)
    return HybridReducer(plan, group, name, None, costs if name == "auto" else None)  # type: ignore[arg-type]


def link_bytes(reducer: Any, mode: CommMode | None, ranks: int, tokens: int, handed: int) -> float:
    """Bytes that one rank has to send or receive; handed: those it handed to torch.distributed (module docstring)."""
    if isinstance(reducer, GroupInt4):  # ranks stripes in the first hop, one in the second
        return (ranks - 1) * 2 * handed / (ranks + 1)
    if mode == "one_shot":
        return (ranks - 1) * handed
    if mode == "two_shot":
        return (ranks - 1) * -(-tokens // ranks) * (reducer.first.row_bytes + reducer.second.row_bytes)
    return 2 * (ranks - 1) / ranks * handed


def partial_sums(seed: int, rank: int, tokens: int, features: int) -> Tensor:
    """One rank's bf16 [tokens, features]: normal, features of log-normal widths, the same for all tokens and seeds."""
    common = torch.randn(features, generator=torch.Generator().manual_seed(features))
    own = torch.Generator().manual_seed(1000 * features + rank)
    widths = torch.exp(common + 0.25 * torch.randn(features, generator=own))
    values = torch.randn(tokens, features, generator=torch.Generator().manual_seed((seed * 1009 + rank) % 2**63))
    return (values * widths).bfloat16()


def _check_equal(name: str, result: Tensor, group: dist.ProcessGroup) -> None:
    digest = hashlib.sha256(result.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    digests = [""] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest, group)
    if len(set(digests)) > 1:
        raise RuntimeError(f"{name}: the ranks ended with different bits")


def _sqnr(reference: Tensor, result: Tensor) -> float:
    noise = (result.float() - reference).double().square().sum().item()
    return sqnr_db(reference.double().square().sum().item(), noise)


# What is shown


def print_table(config: BenchmarkCollectivesConfig, rows: list[dict[str, Any]]) -> None:
    where = "loopback" if config.rate is None else f"links of {config.rate}"
    table = Table(
        title=f"all-reduce of tokens x {FEATURES} bf16 values over {where}: median ms (speed-up against bf16)"
    )
    for column in ("ranks", "size", *config.algorithms):
        table.add_column(column, justify="right")
    for ranks in config.ranks:
        for size in config.sizes:
            cell = {row["algorithm"]: row["seconds"] for row in rows if (row["ranks"], row["bytes"]) == (ranks, size)}
            figures = (f"{1e3 * cell[name]:.2f} ({cell['bf16'] / cell[name]:.2f}x)" for name in config.algorithms)
            table.add_row(str(ranks), size_text(size), *figures)
    Console(width=None if Console().is_terminal else 132).print(table)


def print_choices(config: BenchmarkCollectivesConfig) -> None:
    """What comm.mode=auto will take, by the tables that were written."""
    for ranks in config.ranks:
        costs = CostTable.load(cost_file(config, ranks))
        choices = ", ".join(f"{size_text(size)} {costs.choose(size)}" for size in config.sizes)
        print(f"auto at tp={ranks}: {choices}    (comm.cost_table={cost_file(config, ranks)})")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds over bytes, one panel per number of ranks, the ideal dashed. Raises LowBitError without matplotlib."""
    require("matplotlib", "report")
    figure = import_module("matplotlib.figure").Figure(layout="constrained")
    panels = sorted({row["ranks"] for row in rows})
    figure.set_size_inches(4.5 * len(panels), 4.5)
    for axes, ranks in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        for number, name in enumerate(dict.fromkeys(row["algorithm"] for row in rows)):
            own = [row for row in rows if (row["ranks"], row["algorithm"]) == (ranks, name)]
            sizes = [row["bytes"] for row in own]
            axes.plot(sizes, [row["seconds"] for row in own], "o-", color=f"C{number}", label=name)
            if own[0]["ideal_seconds"] is not None:
                axes.plot(sizes, [row["ideal_seconds"] for row in own], "--", color=f"C{number}", linewidth=1)
        axes.set(title=f"{ranks} ranks, {rows[0]['rate'] or 'loopback'}", xlabel="bytes of the bf16 tensor")
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.set_xticks(sizes, [size_text(size) for size in sizes], minor=False)
    figure.axes[0].set_ylabel("seconds (dashed: bytes / rate)")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def size_text(size: int) -> str:
    """65536 -> 64KiB."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if size % scale == 0:
            return f"{size // scale}{unit}"
    return f"{size}B"


def bits_per_second(rate: str) -> float:
    """Of a rate such as 100mbit or 1gbit."""
    return int(rate[:-4]) * {"mbit": 1e6, "gbit": 1e9}[rate[-4:]]


def _end_with_the_parent() -> None:
    """The parent holds the other end of our standard input, and never writes to it."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    if sys.argv[1:2] != ["worker"]:
        sys.exit(main(sys.argv[1:]))
    _end_with_the_parent()
    try:
        work(int(sys.argv[2]), Path(sys.argv[3]), CONFIG.model_validate_json(sys.argv[4]), int(sys.argv[5]))
    except LowBitError as problem:
        sys.exit(runner.fail(str(problem)))
