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

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_lowbit.comm.cost import CostTable
from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.files import read_json
from megatron_lowbit.launch import runner
from megatron_lowbit.launch.arguments import BAD_INPUT, fail
from megatron_lowbit.launch.bench.arguments import parse_collectives
from megatron_lowbit.launch.bench.collectives_rank import FEATURES, cell_limit, cost_file, size_text, start_limit
from megatron_lowbit.launch.bench.config import BenchmarkCollectivesConfig
from megatron_lowbit.launch.bench.netlab import network, uninterrupted
from megatron_lowbit.launch.tables import print_table
from megatron_lowbit.runtime.distributed import PreemptionCheck
from megatron_lowbit.runtime.metrics import MetricLogger, progress, require
from megatron_lowbit.runtime.rendezvous import on_loopback
from megatron_lowbit.runtime.say import say
from megatron_lowbit.temporary import scratch_folder

CONFIG = BenchmarkCollectivesConfig


# The command


def main(argv: list[str]) -> int:
    """Run `megatron-lowbit benchmark collectives ARGV`; returns the exit code."""
    # Through all `finally`s, which end the ranks and remove the namespaces.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        config = parse_collectives(argv)
        if config.wandb != "off":
            require("wandb", "wandb")
        return runner.run_rank("benchmark", sys.modules[__name__], config)
    except LowBitError as error:
        return fail(str(error))
    finally:
        signal.signal(signal.SIGTERM, before)


def run(config: BenchmarkCollectivesConfig, logger: MetricLogger) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    cells = [(ranks, size) for ranks in config.ranks for size in config.sizes]
    measured = (cell for ranks in config.ranks for cell in measure(config, ranks))
    preemption = PreemptionCheck()
    for (ranks, size), cell in zip(progress(cells, len(cells), "timing"), measured, strict=True):
        preemption.check()
        rows += cell
        logger.log(ranks=ranks, bytes=size, **{f"{row['algorithm']}_seconds": row["seconds"] for row in cell})
    print_rows(config, rows)
    if config.tune:
        print_choices(config)
    try:
        plot(rows, Path(config.output_dir) / "collectives.png")
    except LowBitError as error:
        print(f"megatron-lowbit: no collectives.png: {error}", file=sys.stderr)
    return {"rows": rows}


# The processes


def measure(config: BenchmarkCollectivesConfig, ranks: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each of `sizes`, in order, as they are done. Whatever happens, no rank and no namespace is
    left."""
    with (
        scratch_folder() as folder,
        network(config.rate, ranks) as host,
        started(config, ranks, folder, host) as workers,
    ):
        for number, size in enumerate(config.sizes):
            deadline = (
                time.monotonic() + cell_limit(config, ranks, size) + (0 if number else start_limit(config, ranks))
            )
            result = folder / f"{number}.json"
            while not result.exists():
                _raise_if_failed(workers, folder)
                if time.monotonic() > deadline:
                    raise LowBitError(
                        f"ranks={ranks} sizes={size} did not finish in time; set a smaller size, a lower cell_seconds "
                        "or a higher rate"
                    )
                time.sleep(0.02)
            yield read_json(result, nan=True)["rows"]


@contextlib.contextmanager
def started(
    config: BenchmarkCollectivesConfig, ranks: int, folder: Path, host: list[list[str]]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start the worker processes; they are killed at the end. Rank r's output goes to <folder>/r.log."""
    environ = {**os.environ, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    if config.rate is None:
        environ |= on_loopback(environ)
    command = [
        sys.executable,
        "-m",
        "megatron_lowbit.launch.bench.collectives_rank",
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
    """Raise the error of a rank that ended before its time: its last line as a LowBitError if it was bad input, else
    all it said."""
    failed = [rank for rank, worker in enumerate(workers) if worker.poll()]
    if not failed:
        return
    log = (folder / f"{failed[0]}.log").read_text(errors="replace").strip()
    if workers[failed[0]].returncode == BAD_INPUT:
        raise LowBitError(log.splitlines()[-1].removeprefix("megatron-lowbit: ") if log else "a rank failed")
    raise RuntimeError(f"rank {failed[0]} of {len(workers)} ended with code {workers[failed[0]].returncode}:\n{log}")


# What is shown


def print_rows(config: BenchmarkCollectivesConfig, rows: list[dict[str, Any]]) -> None:
    where = "loopback" if config.rate is None else f"links of {config.rate}"
    title = f"all-reduce of tokens x {FEATURES} bf16 values over {where}: median ms, and speed-up against bf16"
    cells = []
    for ranks in config.ranks:
        for size in config.sizes:
            cell = {row["algorithm"]: row["seconds"] for row in rows if (row["ranks"], row["bytes"]) == (ranks, size)}
            figures = (f"{1e3 * cell[name]:.2f}\n{cell['bf16'] / cell[name]:.2f}x" for name in config.algorithms)
            cells.append((str(ranks), size_text(size), *figures))
    print_table(dict.fromkeys(("ranks", "size", *config.algorithms), "right"), cells, title)


def print_choices(config: BenchmarkCollectivesConfig) -> None:
    """Print what comm.mode=auto will take, by the tables that were written."""
    for ranks in config.ranks:
        costs = CostTable.load(cost_file(config, ranks))
        choices = ", ".join(f"{size_text(size)} {costs.choose(size)}" for size in config.sizes)
        say(f"auto at tp={ranks}: {choices}    (comm.cost_table={cost_file(config, ranks)})")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot seconds over bytes, one panel per number of ranks, the ideal dashed. Raises LowBitError without
    matplotlib."""
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
