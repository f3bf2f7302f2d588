"""What a run takes on tp x dp ranks, from shapes alone: operations and bytes per stage, and seconds at given rates.

Counted as the files of qllm/ and comm/calibration.py do them, per rank; nothing overlaps there, so seconds add up:

    flops        matrix products: partial and whole forwards of a block, backward as two forwards, Gram matrices
    rounded      values that are fake-quantized: candidates' and trained weights, inputs of linears
    observed     values of partial sums that go into the ranges, one for each size, rank, token and feature
    network      bytes that a rank receives: all shards' partial sums, their gradients, what data parallelism shares
    disk         bytes of weights that a rank reads, and rank 0 writes

Left out: norms, rotary embeddings, activation functions, Python, and the streams of activations, which stay in the page
cache where they fit. So small models take longer than this says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F

from megatron_lowbit.comm.observers import STATISTICS, window_statistics
from megatron_lowbit.config import QuantizeConfig, RatesConfig
from megatron_lowbit.qllm.calibration_share import held_out_windows
from megatron_lowbit.quant.affine import fake_quantize
from megatron_lowbit.runtime.distributed import device
from megatron_lowbit.temporary import scratch_folder

# Bytes of memory traffic per value when the rate is given as memory bandwidth: the passes of fake_quantize and of
# window_statistics, each reading and writing float32 (or float64).
ROUNDING_BYTES, OBSERVING_BYTES = 84, 232


@dataclass(frozen=True)
class Work:
    """The work of one rank."""

    flops: float = 0.0
    rounded: float = 0.0
    observed: float = 0.0
    network: float = 0.0
    disk: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(getattr(self, f.name) * factor for f in fields(Work)))


@dataclass(frozen=True)
class Rates:
    """Per second and rank, by the names of Work. network: None where it is not known."""

    flops: float
    rounded: float
    observed: float
    disk: float
    network: float | None
    given: tuple[str, ...]  # those that come from the config; the others are measured on this machine

    def seconds(self, work: Work) -> dict[str, float]:
        """Return {resource: seconds}; without the network where its rate is not known."""
        rates = {f.name: getattr(self, f.name) for f in fields(Work)}
        return {name: getattr(work, name) / rate for name, rate in rates.items() if rate is not None}


@dataclass(frozen=True)
class Shape:
    """A model as the ranks see it. Weights and widths are of one rank's share of one block.

    qkv, o, gate_up, down: weights; attention: flops of q k^T and p v per token; columns: column-parallel linears;
    trained: values of A and B; stored: bytes of a weight on disk; value: bytes of an activation.
    """

    depth: int
    hidden: int
    row_widths: tuple[int, int]
    qkv: float
    o: float
    gate_up: float
    down: float
    attention: float
    columns: int
    trained: float
    packed_bytes: float
    stored: int
    value: int

    @property
    def weights(self) -> float:
        return self.qkv + self.o + self.gate_up + self.down


def stages(shape: Shape, tokens: int, windows: int, config: QuantizeConfig, sizes: tuple[int, ...]) -> dict[str, Work]:
    """Return {stage: work}. tokens, windows: of all ranks. sizes: tensor-parallel sizes whose ranges are recorded."""
    mine, tp, dp = tokens / config.dp, config.tp, config.dp
    groups = config.weights.shard_groups or 1  # chosen by now
    gathered = (1 - 1 / tp) * groups * shape.hidden * shape.value  # bytes of one gathered partial sum per token
    attend, o, gate_up, down = 2 * shape.qkv + shape.attention, 2 * shape.o, 2 * shape.gate_up, 2 * shape.down
    inputs = 2 * shape.hidden + sum(shape.row_widths)  # values that linears read, per token
    forward = Work(flops=attend + o + gate_up + down, network=2 * gathered)
    quantized = forward + Work(rounded=inputs)

    def to(flops: float, rows: int) -> Work:
        return Work(flops=flops, network=rows * gathered)

    at_mlp, at_down = to(attend + o, 1), to(attend + o + gate_up, 1)
    size = min(config.correction.blocks_per_group, shape.depth)
    section = config.reassembly
    # Candidates of a column-parallel linear, and of each shard of a row-parallel one.
    wide, narrow = (_choices(config, width) for width in (shape.hidden, round(shape.row_widths[1] * tp / groups)))
    times = 2 if wide and config.weights.rotation != "none" else 1  # down is judged with R4 and without
    per_token, per_block = Work(), Work(rounded=shape.weights)
    if section.mode != "none":
        # The statistics of the MLP's two inputs; those of the attention's are its own.
        per_token += at_mlp + at_down * times
        grams = 2 * 2 * shape.hidden**2 + times * sum(2 * w**2 * tp / groups for w in shape.row_widths[1:])
        per_token += Work(flops=grams)
        per_block += Work(
            flops=2 * shape.hidden * (shape.qkv + shape.gate_up)
            + times * 2 * shape.down * shape.row_widths[1] * tp / groups
        )
        per_block += Work(network=2 * (1 - 1 / dp) * 8 * 2 * shape.hidden**2)
    if wide:
        per_token += Work(flops=(1 + wide) * (attend + gate_up) + times * (1 + narrow + 3) * down)
        per_token += at_mlp + at_down * 2 * times
        per_token += Work(rounded=wide * 2 * shape.hidden + times * (narrow + 2) * shape.row_widths[1])
        per_block += Work(rounded=wide * (shape.qkv + shape.gate_up) + times * (narrow + 2) * shape.down)
    search = (per_token + quantized * ((size - 1) / size)) * mine + per_block

    correction, tuning = Work(), config.correction
    if tuning.mode != "none":
        held_out = held_out_windows(windows, tuning.holdout) / windows
        epochs, share = tuning.epochs, 1 - held_out
        trained = forward * 3 + Work(rounded=inputs, network=shape.columns * gathered - 4 * gathered)
        judged = held_out * (epochs + 1) if held_out else 2  # passes over all windows
        correction = (quantized * judged + trained * (epochs * share)) * mine
        rounded = epochs * share * windows / dp  # each of them rounds all weights
        correction += Work(rounded=1.5 * shape.weights) * rounded
        each = tuning.batch_size / dp
        steps = windows * share / tuning.batch_size
        correction += Work(network=(dp - 1) * each * 4 * shape.trained) * (epochs * steps)
        if tuning.rank == "auto":  # the four inputs' x x^T or e e^T, gathered for every window; not the eigenvalues
            correction += (trained + Work(flops=o + down + 4 * 2 * shape.hidden**2)) * mine
            correction += Work(network=4 * 8 * shape.hidden**2 * (1 - 1 / dp) * windows)
            correction += Work(
                flops=2 * shape.hidden * (shape.qkv + shape.gate_up + 2 * shape.columns * shape.hidden**2)
            )
    shares = 2 * shape.hidden * (1 + sum(sizes))  # values of partial sums per token
    observed = Work(observed=shares) * mine
    exchanged = Work(network=(1 - 1 / dp) * STATISTICS * 8 * shares * windows)
    names = {
        **({"learned rotation": _learned(shape, mine, windows, config, forward, inputs)} if learns(config) else {}),
        "load": Work(disk=shape.weights * shape.stored),
        "full precision": forward * mine,
        "reassembly": search,
        "correction": correction,
        "ranges": quantized * mine + observed + exchanged,
        "write": Work(disk=shape.packed_bytes * tp),
    }
    return {name: work * shape.depth for name, work in names.items()}


def learns(config: QuantizeConfig) -> bool:
    """Tell whether a pass that learns the rotation comes first."""
    return config.weights.rotation == "learned"


def _learned(shape: Shape, mine: float, windows: int, config: QuantizeConfig, forward: Work, inputs: float) -> Work:
    """Return the work of learning the rotation, per block: every window folds, rounds and trains, every batch steps."""
    section, dp, tp = config.rotation, config.dp, config.tp
    square, groups = shape.hidden**2, config.weights.shard_groups or 1
    window = Work(flops=4 * shape.hidden * shape.weights, rounded=1.5 * shape.weights)
    window += Work(network=(1 - 1 / tp) * groups * 4 * square)  # the gradient of Q, of every shard
    # Four matrix products of the gradient and the transform's bound, three iterations, some three Newton-Schulz steps.
    step = Work(flops=13 * 2 * shape.hidden**3, network=(dp - 1) * section.batch_size / dp * 4 * square)
    epoch = (forward * 4 + Work(rounded=inputs)) * mine + Work(disk=shape.weights * shape.stored)
    epoch += window * (windows / dp) + step * -(-windows // section.batch_size)
    return epoch * section.epochs


def _choices(config: QuantizeConfig, width: int) -> int:
    """Return how many distinct plans are scored, no reassembly among them; none where there is nothing to choose
    from."""
    added = {max(1, round(ratio * width)) for ratio in config.reassembly.expansions}
    return 1 + len(added) if config.reassembly.mode == "adaptive" else 0


def calibrate_stage(shape: Shape, tokens: int, windows: int, config: QuantizeConfig, sizes: tuple[int, ...]) -> Work:
    """Return the work of `calibrate` alone: one forward, the partial sums of every size again, their statistics."""
    mine, tp = tokens / config.dp, config.tp
    rows = 2 * (shape.o + shape.down)
    flops = 2 * shape.weights + shape.attention + rows * len(sizes)
    shares = 2 * shape.hidden * (1 + sum(sizes) / tp)
    ring = 2 * 2 * (1 - 1 / tp) * shape.hidden * shape.value
    work = Work(flops=flops, observed=shares, network=ring) * mine
    work += Work(network=(1 - 1 / config.dp) * STATISTICS * 8 * shares * windows, disk=shape.weights * shape.stored)
    return work * shape.depth


def find_rates(given: RatesConfig, rows: int, shape: tuple[int, int], hidden: int) -> Rates:
    """Return the rates that are given, the others measured here in about two seconds. rows: tokens of a window; shape:
    of the widest linear."""
    flops = given.flops or _matmul(rows, *shape)
    rounded = given.memory / ROUNDING_BYTES if given.memory else _rounding(*shape)
    observed = given.memory / OBSERVING_BYTES if given.memory else _observing(rows, hidden)
    sources = {"flops": "flops", "rounded": "memory", "observed": "memory", "disk": "disk", "network": "network"}
    names = tuple(name for name, key in sources.items() if getattr(given, key) is not None)
    return Rates(flops, rounded, observed, given.disk or _disk(), given.network, names)


def _best(action: Callable[[], object], seconds: float = 0.5) -> float:
    """Measure the seconds of the fastest run."""
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == float("inf"):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _matmul(rows: int, outputs: int, inputs: int) -> float:
    """Measure the floating-point operations per second of x W^T, on one of the model's shapes."""
    dtype = torch.float32 if device().type == "cpu" else torch.bfloat16
    rows, outputs, inputs = min(rows, 512), min(outputs, 4096), min(inputs, 4096)
    x, w = (torch.ones(n, inputs, device=device(), dtype=dtype) for n in (rows, outputs))
    return 2 * rows * outputs * inputs / _best(lambda: F.linear(x, w))


def _rounding(outputs: int, inputs: int) -> float:
    weight = torch.randn(min(outputs, 2048), min(inputs, 2048), device=device())
    return weight.numel() / _best(lambda: fake_quantize(weight, 4), 0.3)


def _observing(rows: int, hidden: int) -> float:
    y = torch.randn(1, rows, min(hidden, 2048), device=device())
    mask = torch.ones(1, rows, dtype=torch.bool, device=device())
    return y.numel() / _best(lambda: window_statistics(y, mask), 0.3)


def _disk() -> float:
    """Measure the bytes per second of writing to the temporary folder and flushing it."""
    data = bytes(32 * 2**20)
    with scratch_folder() as folder:
        start = time.perf_counter()
        with open(folder / "probe", "wb", buffering=0) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - start)
