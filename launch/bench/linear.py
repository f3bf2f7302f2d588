"""megatron-lowbit benchmark linear: seconds of a quantized linear against F.linear in bf16 and others, side by side.

What is compared takes turns on the same tokens (linear_ways.py says what it is): a round runs each once or, where that
takes less than a few milliseconds, on one weight after the other. Each has several weights, so that no product finds
its own in a cache: `cold` says whether more bytes of other weights than the largest cache holds are read between two
uses of one.

    seconds        of a call, in every round: CPU time of one thread, time that passes of several
    ratio          median over the rounds of F.linear's seconds through these; packed_ratio: of packed_bf16's
    gops           2 tokens outputs inputs / median seconds / 1e9
    peak_share     of the highest peak that a core's instructions reach for what is multiplied (peak.py), times threads
    gb_per_second  bytes of the weight / median seconds / 1e9, where one token reads it
    check          bits: the results are those of the reference op; float32: they are as near as sums in float32 have to
                   be (weight-only schemes). Anything else ends the run

A way that does not run here, or not with this shape, is told with its reason.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.config import LowBitError, one_line
from megatron_lowbit.kernels import FLOAT_BITS, hadamard_obstacle
from megatron_lowbit.launch import runner
from megatron_lowbit.launch.arguments import fail
from megatron_lowbit.launch.bench.arguments import parse_linear
from megatron_lowbit.launch.bench.config import BenchmarkLinearConfig
from megatron_lowbit.launch.bench.linear_ways import BASELINE, Way, baseline, ours, peer, reason
from megatron_lowbit.launch.bench.peak import measure_peaks
from megatron_lowbit.launch.bench.report import circumstances, clock, markdown, print_heading
from megatron_lowbit.launch.bench.shapes import all_shapes
from megatron_lowbit.launch.tables import Justify, number
from megatron_lowbit.quant.affine import QuantizedWeight, Scheme
from megatron_lowbit.runtime.distributed import PreemptionCheck
from megatron_lowbit.runtime.metrics import MetricLogger, progress
from megatron_lowbit.runtime.say import say

CONFIG = BenchmarkLinearConfig
CHECKED = 64  # tokens, at least, whose results are compared with the reference op's, where there are as many
TURN_SECONDS = 0.01  # of a way in a round, if it has as many weights
FEWEST, MOST = 12, 256  # copies of a weight


def main(argv: list[str]) -> int:
    """Run `megatron-lowbit benchmark linear ARGV`; returns the exit code."""
    try:
        config = parse_linear(argv)
        return runner.run_rank("benchmark", sys.modules[__name__], config)
    except LowBitError as error:
        return fail(str(error))


@torch.inference_mode()
def run(config: BenchmarkLinearConfig, logger: MetricLogger) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    about = circumstances()
    peaks = _peaks(about)
    shapes = all_shapes(config.shapes, config.models, config.linears, config.tp_sizes)
    cells = [(shape, threads) for threads in sorted(set(config.threads)) for shape in shapes]
    rows: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    try:
        for shape, threads in progress(cells, len(cells), "timing"):
            torch.set_num_threads(threads)
            measured = measure_shape(config, shape, threads, peaks)
            rows += [{**row, "linears": shapes[shape]} for row in measured]
            for row in measured:
                if "ratio" in row:
                    label = "{outputs}x{inputs} {way} tokens={tokens} threads={threads}".format(**row)
                    logger.log(row=label, ratio=row["ratio"], seconds=row["median_seconds"])
    finally:
        torch.set_num_threads(before)
    print_rows(rows, peaks, about)
    return {"rows": rows, "peaks": peaks, **about}


def _peaks(about: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the peaks; without a compiler none, and the reason in `about`."""
    try:
        return measure_peaks()
    except (OSError, RuntimeError) as error:
        about["no_peaks"] = one_line(error)
        return {"int8": {}, "bf16": {}}


# The measurement


def measure_shape(
    config: BenchmarkLinearConfig, shape: tuple[int, int], threads: int, peaks: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Return a row for every way and number of tokens, skipped ways among them. shape: (outputs, inputs)."""
    outputs, inputs = shape
    weight = (torch.randn(outputs, inputs) / inputs**0.5).bfloat16()
    x = torch.randn(max(config.tokens), inputs).bfloat16()
    ways, rows = make_ways(config, weight, x)
    measured = [{**row, "outputs": outputs, "inputs": inputs, "threads": threads} for row in rows]
    for tokens in PreemptionCheck().each(sorted(set(config.tokens))):
        about = {"outputs": outputs, "inputs": inputs, "tokens": tokens, "threads": threads}
        measured += [{**about, **row} for row in measure_cell(config, ways, x[:tokens], clock(threads))]
    for row in measured:
        if "median_seconds" in row:
            row["gops"] = 2e-9 * row["tokens"] * outputs * inputs / row["median_seconds"]
            peak = max(peaks[row["kind"]].values(), default=None)
            row["peak_share"] = None if peak is None else 1e9 * row["gops"] / (peak * threads)
            read = 1e-9 * row["weight_bytes"] / row["median_seconds"]
            row["gb_per_second"] = read if row["tokens"] == 1 else None
    return measured


def make_ways(config: BenchmarkLinearConfig, weight: Tensor, x: Tensor) -> tuple[list[Way], list[dict[str, Any]]]:
    """Return what is compared, F.linear first, and rows of what cannot be made of this shape."""
    ways = [baseline(weight), *(peer(name, weight) for name in dict.fromkeys(config.peers))]
    skipped: list[dict[str, Any]] = []
    rows = checked_rows(config.tokens)
    for scheme in dict.fromkeys(config.schemes):
        bits = Scheme.parse(scheme)
        codes = QuantizedWeight.from_float(weight, bits.weight_bits)
        for groups in (1,) if bits.act_bits == FLOAT_BITS else dict.fromkeys(config.act_groups):
            if weight.shape[1] % groups == 0:
                ways.append(ours(scheme, groups, codes, x, rows))
                if groups > 1 and hadamard_obstacle(weight.shape[1], groups) is None:  # as an input of down_proj
                    ways.append(ours(scheme, groups, codes, x, rows, rotated=True))
            else:
                why = f"{groups} groups do not divide {weight.shape[1]} inputs"
                skipped.append({"way": f"{scheme} x{groups}", "skipped": why})
    return ways, skipped


def checked_rows(tokens: tuple[int, ...]) -> Tensor:
    """Return which tokens of all the batches are checked: the first and the last of each, and some between."""
    step = max(1, max(tokens) // CHECKED)
    rows = {*range(min(16, max(tokens))), *range(0, max(tokens), step), *(count - 1 for count in tokens)}
    return torch.tensor(sorted(rows))


def measure_cell(
    config: BenchmarkLinearConfig, ways: list[Way], x: Tensor, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Return a row for each way on x, bf16 [tokens, in]; F.linear's ratio is 1."""
    rows: dict[str, dict[str, Any]] = {}
    turns: dict[str, int] = {}
    round_seconds = 0.0
    for way in ways:
        rows[way.name] = {"way": way.name, "kind": way.kind, "weight_bytes": way.weight_bytes}
        try:
            way.calls = [way.make(x)]
            first_call(way, 0)
            start = clock()
            way.calls[0]()
            seconds = max(clock() - start, 1e-9)
        except Exception as error:
            if way.check is not None or way.name == BASELINE:
                raise
            rows[way.name] |= {"skipped": reason(error)}
            continue
        turns[way.name] = max(1, int(TURN_SECONDS / seconds))
        round_seconds += turns[way.name] * seconds
    rounds = min(config.repeats, max(3, int(config.cell_seconds / round_seconds)))
    running, copies = [way for way in ways if way.name in turns], number_of_weights(config, ways)
    for way in running:
        turns[way.name] = min(copies, turns[way.name])
        way.calls += [way.make(x) for _ in range(1, min(copies, rounds * turns[way.name]))]
        agrees = {first_call(way, place) for place in range(len(way.calls))}
        if way.check is not None:
            rows[way.name]["check"] = "bits" if agrees == {"bits"} else "float32"
    seconds_of = time_rounds(running, turns, rounds, clock)
    bytes_of_round = sum(way.weight_bytes * turns[way.name] for way in running)
    for way in running:
        mine, row = seconds_of[way.name], rows[way.name]
        row |= {"seconds": mine, "median_seconds": statistics.median(mine), "weights": len(way.calls)}
        row["ratio"] = ratio(seconds_of[BASELINE], mine)
        row["packed_ratio"] = ratio(seconds_of["packed_bf16"], mine) if "packed_bf16" in seconds_of else None
        row["cold"] = len(way.calls) // turns[way.name] * bytes_of_round > largest_cache()
    for way in ways:
        way.calls = []
    return list(rows.values())


def first_call(way: Way, place: int) -> str | None:
    """Run a call for the first time, which warms it up, and return how its result agrees with the reference op."""
    y = way.calls[place]()
    return None if way.check is None else way.check(y)


def time_rounds(
    ways: list[Way], turns: dict[str, int], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return {way: seconds of a call in every round}. Rounds alternate between the given order and its reverse.

    turns: calls of a way in a round; the next round goes on where it stopped.
    """
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for round_ in range(rounds):
        for way in ways if round_ % 2 == 0 else reversed(ways):
            count = turns[way.name]
            calls = [way.calls[(round_ * count + place) % len(way.calls)] for place in range(count)]
            start = clock()
            for call in calls:
                call()
            seconds[way.name].append((clock() - start) / count)
    return seconds


def ratio(of: list[float], through: list[float]) -> float:
    """Return the median of the rounds' quotients."""
    return statistics.median(a / b for a, b in zip(of, through, strict=True))


def number_of_weights(config: BenchmarkLinearConfig, ways: list[Way]) -> int:
    """Return the copies of each weight: as asked for, or as many as fill the largest cache twice; fewer where memory
    is short."""
    bytes_of_one = sum(way.weight_bytes for way in ways)
    enough = min(MOST, max(FEWEST, 1 + 2 * largest_cache() // bytes_of_one))
    fits = int(config.memory_share * free_memory()) // bytes_of_one
    return max(1, min(config.weights or enough, fits))


def largest_cache() -> int:
    """Return the bytes of the largest cache that this system tells of; 32 MiB where it tells of none."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K") and text[:-1].isdecimal():
            sizes.append(int(text[:-1]) * 2**10)
    return max(sizes, default=2**25)


def free_memory() -> int:
    """Return the bytes that new data may take, by Linux's own estimate; 4 GiB where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**32
    return next((int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable")), 2**32)


# What is shown


def print_rows(
    rows: list[dict[str, Any]],
    peaks: dict[str, dict[str, float]],
    about: dict[str, Any],
) -> None:
    print_heading("Linears against F.linear in bf16", about)
    best = [f"{name} {rate / 1e9:,.0f} GOP/s" for kind in peaks.values() for name, rate in kind.items()]
    say(f"Peaks of a core: {', '.join(best) or about.get('no_peaks', 'none is known for this processor')}")
    columns: dict[str, Justify] = {
        "tokens": "right",
        "way": "left",
        "ms": "right",
        "x bf16": "right",
        "x pack": "right",
        "GOP/s": "right",
        "peak": "right",
        "GB/s": "right",
    }
    tables: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        if "ratio" in row:
            threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
            tables.setdefault(f"{row['outputs']}x{row['inputs']}, {threads}", []).append(_cells(row))
    for title, cells in tables.items():
        print(f"\n### {title}\n\n{markdown(columns, cells)}")
    for line in notes(rows):
        print()
        say(line)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    milliseconds = 1e3 * row["median_seconds"]
    return (
        str(row["tokens"]),
        row["way"],
        f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}",
        number(row["ratio"], ".2f"),
        number(row["packed_ratio"], ".2f"),
        number(row["gops"], ",.0f"),
        "-" if row["peak_share"] is None else f"{100 * row['peak_share']:.0f} %",
        number(row["gb_per_second"], ".1f"),
    )


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """Return what has to be known about the figures: how they were checked and measured, and what is missing."""
    timed = [row for row in rows if "ratio" in row]
    checked = [row for row in timed if "check" in row]
    near = list(dict.fromkeys(row["way"] for row in checked if row["check"] == "float32"))
    exact = list(dict.fromkeys(row["way"] for row in checked if row["way"] not in near))
    lines = [f"Bit for bit the reference op's: {', '.join(exact)}."] if exact else []
    if near:
        lines.append(f"As near to it as sums in float32: {', '.join(near)}.")
    lines.append("x bf16, x pack: speed-up against F.linear, and against oneDNN with a prepacked weight.")
    lines.append("Times are CPU time with one thread, time that passes with more; medians of interleaved rounds.")
    if warm := sorted({f"{row['outputs']}x{row['inputs']}" for row in timed if not row["cold"]}):
        lines.append(f"A cache may have held weights of {', '.join(warm)}: raise weights, and memory_share.")
    missing: dict[str, list[str]] = {}
    for row in rows:
        if "skipped" in row:
            where = f"{row['outputs']}x{row['inputs']}"
            missing.setdefault(f"{row['way']} does not run here: {row['skipped']}", []).append(where)
    return [*lines, *(f"{what} ({', '.join(dict.fromkeys(where))})." for what, where in missing.items())]
