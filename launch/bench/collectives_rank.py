"""One rank of `benchmark collectives`: measures all sizes, and rank 0 writes what it found (collectives.py).

python -m megatron_lowbit.launch.bench.collectives_rank worker RANKS FOLDER CONFIG RANK
"""

from __future__ import annotations

import datetime
import hashlib
import os
import statistics
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.comm.autotune import measure_costs, one_round, slowest
from megatron_lowbit.comm.build_plan import synthetic_plan
from megatron_lowbit.comm.cost import CostTable
from megatron_lowbit.comm.plan import SitePlan
from megatron_lowbit.comm.reducers import HybridReducer, is_low_bit
from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.files import write_json
from megatron_lowbit.launch.arguments import fail
from megatron_lowbit.launch.bench.config import BenchmarkCollectivesConfig
from megatron_lowbit.launch.bench.peers import GroupInt4, StockAllReduce
from megatron_lowbit.quality import sqnr_db
from megatron_lowbit.runtime import preemption
from megatron_lowbit.runtime.distributed import all_gather_values

FEATURES = 1024
CALIBRATION_TOKENS = 512
LEAST_ROUNDS = 3
STARTUP_SECONDS = 180  # 64 processes import torch, and kernels are compiled, on two cores


def work(ranks: int, folder: Path, config: BenchmarkCollectivesConfig, rank: int) -> None:
    """Measure all sizes, the whole life of a worker; rank 0 writes <folder>/<number of the size>.json."""
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
    dist.barrier()  # so that gloo's threads have let go of the last tensors before Python ends
    dist.destroy_process_group()


@torch.inference_mode()
def measure_cell(
    config: BenchmarkCollectivesConfig, size: int, group: dist.ProcessGroup, costs: CostTable | None = None
) -> list[dict[str, Any]]:
    """Measure one row per algorithm; the same on all ranks but for sqnr_db, which rank 0 measures."""
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
        if is_low_bit(name):
            _check_equal(name, result, group)
        bits, handed = reducer.traffic.bits_per_value, reducer.traffic.bytes
        chosen = reducer.choose(x.numel()) if isinstance(reducer, HybridReducer) else None
        link = link_bytes(reducer, ranks, handed) if chosen is None else chosen.link_bytes(tokens, features, ranks)
        rows.append(
            {
                "name": f"{name}, {ranks} ranks, {size_text(size)}",
                "ranks": ranks,
                "bytes": size,
                "rate": config.rate,
                "algorithm": name,
                "mode": chosen and chosen.name,
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
    """Return {algorithm: seconds of each repetition, of the slowest rank}."""

    def rounds(count: int) -> list[list[float]]:
        return slowest([one_round(algorithms, number, inputs, group) for number in range(count)], group)

    # The check of the results has warmed up once. How often to repeat is decided once, for all ranks alike.
    (first,) = rounds(1)
    count = min(config.repeats, max(LEAST_ROUNDS, int(config.cell_seconds / sum(first))))
    return dict(zip(algorithms, map(list, zip(*rounds(count), strict=True)), strict=True))


def calibrated(config: BenchmarkCollectivesConfig, ranks: int, features: int) -> SitePlan:
    """Return the plan of partial sums like those that are sent."""
    sample = [partial_sums(config.seed + 1, r, CALIBRATION_TOKENS, features).float() for r in range(ranks)]
    return synthetic_plan(torch.stack(sample), config.comm)


def cost_file(config: BenchmarkCollectivesConfig, ranks: int) -> Path:
    return Path(config.output_dir) / f"costs-tp{ranks}.json"


def algorithm(name: str, plan: SitePlan, group: dist.ProcessGroup, costs: CostTable | None) -> Any:
    """Return an object with all_reduce(x) and traffic."""
    if name in ("bf16", "fp32"):
        return StockAllReduce(group)
    if name == "group32":
        return GroupInt4(group)
    return HybridReducer(plan, group, name, None, costs if name == "auto" else None)  # type: ignore[arg-type]


def link_bytes(reducer: Any, ranks: int, handed: int) -> float:
    """Return the bytes that one rank has to send or receive; handed: those it handed to torch.distributed (module
    docstring)."""
    if isinstance(reducer, GroupInt4):  # ranks stripes in the first hop, one in the second
        return (ranks - 1) * 2 * handed / (ranks + 1)
    return 2 * (ranks - 1) / ranks * handed


def partial_sums(seed: int, rank: int, tokens: int, features: int) -> Tensor:
    """Return one rank's bf16 [tokens, features]: normal, features of log-normal widths, the same for all tokens and
    seeds."""
    common = torch.randn(features, generator=torch.Generator().manual_seed(features))
    own = torch.Generator().manual_seed(1000 * features + rank)
    widths = torch.exp(common + 0.25 * torch.randn(features, generator=own))
    values = torch.randn(tokens, features, generator=torch.Generator().manual_seed((seed * 1009 + rank) % 2**63))
    return (values * widths).bfloat16()


def _check_equal(name: str, result: Tensor, group: dist.ProcessGroup) -> None:
    digest = hashlib.sha256(result.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    if len(set(all_gather_values(digest, group))) > 1:
        raise RuntimeError(f"{name}: the ranks ended with different bits")


def _sqnr(reference: Tensor, result: Tensor) -> float:
    noise = (result.float() - reference).double().square().sum().item()
    return sqnr_db(reference.double().square().sum().item(), noise)


def cell_limit(config: BenchmarkCollectivesConfig, ranks: int, size: int) -> float:
    """Return the seconds after which a cell has hung, generously: float32 in a ring is the slowest, and cores are
    shared."""
    speed = 1e8 if config.rate is None else min(1e8, bits_per_second(config.rate) / 8)
    longest = 2 * 2 * size / speed + 0.01 * ranks
    return 60 + 3 * config.cell_seconds + 5 * (LEAST_ROUNDS + 2) * len(config.algorithms) * longest


def start_limit(config: BenchmarkCollectivesConfig, ranks: int) -> float:
    """Return the seconds before the first cell: imports, and the table that auto goes by."""
    tuning = sum(cell_limit(config, ranks, size) for size in config.sizes) if "auto" in config.algorithms else 0
    return STARTUP_SECONDS + tuning


def size_text(size: int) -> str:
    """Return a number of bytes as text: 65536 -> 64KiB."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if size % scale == 0:
            return f"{size // scale}{unit}"
    return f"{size}B"


def bits_per_second(rate: str) -> float:
    """Return the bits per second of a rate such as 100mbit or 1gbit."""
    return int(rate[:-4]) * {"mbit": 1e6, "gbit": 1e9}[rate[-4:]]


def _end_with_the_parent() -> None:
    """End this process with its parent, which holds the other end of our standard input and never writes to it.

    The thread alone would wait for a main thread that is in a call that keeps Python's lock; the kernel waits for none.
    """
    preemption.die_with_parent()

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _end_with_the_parent()
    try:
        config = BenchmarkCollectivesConfig.model_validate_json(sys.argv[4])
        work(int(sys.argv[2]), Path(sys.argv[3]), config, int(sys.argv[5]))
    except LowBitError as problem:
        sys.exit(fail(str(problem)))
