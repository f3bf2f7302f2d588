"""What the workers of a RankPool run: `case(rank, size, *args)`, each returns something that can be pickled.

deepspeed and transformers are imported inside the cases that need them, so that other pools never wait for them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from observing import observe
from recorded_collectives import RecordedCollectives
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.comm import exchange
from megatron_lowbit.comm.autotune import measure_costs
from megatron_lowbit.comm.collectives import COLLECTIVES
from megatron_lowbit.comm.cost import CostTable
from megatron_lowbit.comm.observers import RangeObserver
from megatron_lowbit.comm.plan import SitePlan
from megatron_lowbit.comm.reducers import HybridReducer
from megatron_lowbit.config import CommMode, LowBitError
from megatron_lowbit.runtime.distributed import all_gather_values, gather_values, on_rank_zero


def echo(rank: int, size: int, value: Any) -> Any:
    return rank, size, value


def messages(rank: int, size: int) -> tuple[object, object, object]:
    """What all ranks, rank 0 and every rank are told: dicts with texts and tensors of each rank's own sizes."""
    mine = {"rank": rank, "text": "x" * (7 * rank), "t": torch.full((rank, 2), rank)}
    gathered, first = all_gather_values(mine, dist.group.WORLD), gather_values(mine, dist.group.WORLD)
    shapes = [(part["rank"], len(part["text"]), list(part["t"].shape), part["t"].sum().item()) for part in gathered]
    told = on_rank_zero(lambda: {"of": rank})
    return shapes, None if first is None else [part["rank"] for part in first], told


def new_collective(rank: int, size: int, code: str, mode: str, partials: Tensor) -> tuple[Tensor, Tensor, float]:
    """What a collective, defined by lines of Python, makes: the sum, this rank's slice of it, bits per value."""
    before = dict(COLLECTIVES)
    try:
        exec(code, {})
        reducer = HybridReducer(None, dist.group.WORLD, mode)  # type: ignore[arg-type]
        whole = reducer.all_reduce(partials[rank])
        bits = reducer.traffic.bits_per_value
        return whole, reducer.reduce_scatter(partials[rank]), bits
    finally:
        COLLECTIVES.clear()
        COLLECTIVES.update(before)


def raise_on(rank: int, size: int, culprit: int) -> None:
    """The culprit raises, the others wait for it in a collective."""
    if rank == culprit:
        raise ValueError(f"rank {rank} was told to")
    dist.barrier()


def die_on(rank: int, size: int, culprit: int) -> None:
    if rank == culprit:
        os._exit(7)
    dist.barrier()


def sleep(rank: int, size: int, seconds: float) -> None:
    time.sleep(seconds)


def environment(rank: int, size: int) -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "omp": os.environ["OMP_NUM_THREADS"],
        "backend": dist.get_backend(),
        "pid": os.getpid(),
    }


def all_reduce(
    rank: int,
    size: int,
    plan: SitePlan | None,
    partials: Tensor,
    views: str = "plain",
    mode: CommMode | None = None,
    costs: CostTable | None = None,
) -> dict[str, Any]:
    """HybridReducer on this rank's `partials[rank]`: the sum, and what was handed to torch.distributed meanwhile."""
    reducer = HybridReducer(plan, dist.group.WORLD, mode, costs=costs)
    x = partials[rank]
    if views == "transposed":  # the same values, column by column in memory
        x = x.t().contiguous().t()
        assert not x.is_contiguous() or min(x.shape) == 1
    elif views == "batched":
        x = x.unflatten(0, (-1, 3))
    before = x.clone()
    reducer.agreement.check(x.reshape(-1, x.shape[-1]))  # which the first call would send
    with RecordedCollectives() as recorded:
        y = reducer.all_reduce(x)
    return {
        "y": y,
        "calls": recorded.calls,
        "traffic": (reducer.traffic.bytes, reducer.traffic.values, reducer.traffic.bits_per_value),
        "input_kept": torch.equal(x, before),
    }


def all_reduce_in_rounds(
    rank: int, size: int, plan: SitePlan, partials: Tensor, mode: CommMode, piece_values: int
) -> dict[str, Any]:
    """`all_reduce` as if its messages were large: in pieces of so many values per receiver, and in pairwise rounds."""
    with mock.patch.object(exchange, "LARGE", 0), mock.patch.object(exchange, "PIECE_VALUES", piece_values):
        return all_reduce(rank, size, plan, partials, "plain", mode)


def all_reduce_in_place(rank: int, size: int, plan: SitePlan, partials: Tensor, mode: CommMode) -> dict[str, Any]:
    """The sum that may be made in x's place: x must be the sum, or as it was, and with a gradient as it was."""
    reducer = HybridReducer(plan, dist.group.WORLD, mode)
    copied, x, learning = partials[rank].clone(), partials[rank].clone(), partials[rank].clone().requires_grad_()
    expected = reducer.all_reduce(copied)
    y, with_gradient = reducer.all_reduce(x, reuse=True), reducer.all_reduce(learning, reuse=True)
    return {
        "equal": torch.equal(y, expected) and torch.equal(with_gradient, expected),
        "in_place": y.data_ptr() == x.data_ptr(),
        "kept": torch.equal(copied, partials[rank]) and torch.equal(learning, partials[rank]),
    }


def hashes_of_sums(
    rank: int, size: int, plan: SitePlan, partials: Tensor, mode: CommMode, orders: list[tuple[int, ...]], repeats: int
) -> set[str]:
    """sha256 of the sums of `repeats` all-reduces, this rank taking the part that each order gives it in turn."""
    reducer, hashes = HybridReducer(plan, dist.group.WORLD, mode), set()
    for number in range(repeats):
        y = reducer.all_reduce(partials[orders[number % len(orders)][rank]])
        hashes.add(hashlib.sha256(y.numpy().tobytes()).hexdigest())
    return hashes


def all_reduce_gradient(
    rank: int, size: int, plan: SitePlan, partials: Tensor, mode: CommMode | None = None
) -> tuple[Tensor, Tensor | None]:
    """(upstream gradient, gradient of this rank's partial sums)."""
    x = partials[rank].clone().requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(rank))
    HybridReducer(plan, dist.group.WORLD, mode).all_reduce(x).backward(upstream)
    return upstream, x.grad


def wrong_plan(rank: int, size: int, plan: SitePlan) -> str:
    try:
        HybridReducer(plan, dist.group.WORLD)
    except LowBitError as error:
        return str(error)
    return "accepted"


def _engine(architecture: str, size: int, dtype: torch.dtype = torch.float32) -> Any:
    """A DeepSpeed engine on all ranks around the tiny model of that architecture."""
    import tiny_models

    from megatron_lowbit.adapters import deepspeed as adapter

    adapter.import_deepspeed().init_distributed(dist_backend="gloo", verbose=False)
    return adapter.init_engine(tiny_models.build(architecture).to(dtype), size, dtype)


def deepspeed_logits(
    rank: int, size: int, architecture: str, artifacts: dict[str, Any], dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Logits of an engine: as it is, with each of {name: (folder or None, comm_mode)} in turn, and after remove.

    One engine serves them all, so every artifact also has to give way to the next one.
    """
    import tiny_models

    import megatron_lowbit as lowbit
    from megatron_lowbit.adapters import patching

    engine = _engine(architecture, size, dtype)
    modules = {name: id(module) for name, module in engine.module.named_modules()}
    results: dict[str, Any] = {
        "unpatched": tiny_models.logits(engine.module),
        "calls": {},
        "rows": {},
        "lm_head": set(),
    }
    for name, (folder, comm_mode) in artifacts.items():
        artifact = lowbit.Artifact() if folder is None else folder
        assert lowbit.apply_to_deepspeed(engine, artifact, comm_mode) is engine
        tiny_models.logits(engine.module)  # a reducer's first call also compares plans
        with RecordedCollectives() as recorded:
            results[name] = tiny_models.logits(engine.module)
        results["calls"][name] = recorded.calls
        results["rows"][name] = sorted(patching.row_parallel_modules(engine))
        results["lm_head"].add(type(engine.module.lm_head).__name__)
    assert lowbit.remove(engine) is engine
    results["removed"] = tiny_models.logits(engine.module)
    results["same_modules"] = {name: id(module) for name, module in engine.module.named_modules()} == modules
    return results


def deepspeed_calibration(rank: int, size: int, architecture: str, tp_sizes: tuple[int, ...]) -> Any:
    """CalibrationStats that the real ranks measure together."""
    import tiny_models

    from megatron_lowbit.adapters import deepspeed as adapter
    from megatron_lowbit.comm.calibration import ParallelGroups, calibrate

    engine = _engine(architecture, size)
    sites, group = adapter.row_parallel_sites(engine), adapter.tp_group(engine)
    text, fingerprint = tiny_models.batches(), adapter.fingerprint(engine)
    groups = ParallelGroups(tp=group)
    return calibrate(engine.module, sites, text, tp_sizes, fingerprint, gamma=0.25, groups=groups)


def deepspeed_calibration_error(rank: int, size: int, tp_size: int) -> str:
    try:
        deepspeed_calibration(rank, size, "llama", (tp_size,))
    except LowBitError as error:
        return str(error)
    return "accepted"


def deepspeed_unknown_layer(rank: int, size: int, folder: Path, block: int) -> dict[str, Any]:
    """An engine of which two layers of that block have types that the adapter does not know."""
    import tiny_models
    from deepspeed.module_inject import layers

    import megatron_lowbit as lowbit

    engine = _engine("llama", size)
    mlp = engine.module.model.layers[block].mlp
    mlp.gate_proj.__class__ = type("Tuned_LinearLayer", (layers.LinearLayer,), {})
    mlp.down_proj.__class__ = type("Tuned_LinearAllreduce", (layers.LinearAllreduce,), {})
    before, refused = tiny_models.logits(engine.module), ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            lowbit.apply_to_deepspeed(engine, folder)
        except LowBitError as error:
            refused = str(error)
    return {
        "refused": refused,
        "warnings": [str(warning.message) for warning in caught if "tensor-parallel" in str(warning.message)],
        "types": {name: type(module).__name__ for name, module in mlp.named_children()},
        "before": before,
        "after": tiny_models.logits(engine.module),
    }


def deepspeed_uneven(rank: int, size: int, folders: list[Path | None]) -> list[str]:
    """The errors of an engine that AutoTP split with its own default grain of 64, for each artifact."""
    import tiny_models

    import megatron_lowbit as lowbit
    from megatron_lowbit.adapters import deepspeed as adapter

    deepspeed = adapter.import_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = tiny_models.build("llama", intermediate_size=352)
    parallel = {"tp_size": size}
    engine = deepspeed.init_inference(
        model, tensor_parallel=parallel, dtype=torch.float32, replace_with_kernel_inject=False
    )
    before, messages = tiny_models.logits(engine.module), []
    for folder in folders:
        try:
            lowbit.apply_to_deepspeed(engine, lowbit.Artifact() if folder is None else folder)
            messages.append("accepted")
        except LowBitError as error:
            messages.append(str(error))
    assert torch.equal(tiny_models.logits(engine.module), before), "a refused artifact changed the engine"
    return messages


def deepspeed_heads(rank: int, size: int) -> str:
    """What an engine says whose model has fewer KV heads than there are ranks: AutoTP gives some of them none."""
    import tiny_models

    import megatron_lowbit as lowbit
    from megatron_lowbit.adapters import deepspeed as adapter

    adapter.import_deepspeed().init_distributed(dist_backend="gloo", verbose=False)
    engine = adapter.init_engine(tiny_models.build("llama", num_key_value_heads=1), size, torch.float32)
    try:
        lowbit.apply_to_deepspeed(engine, lowbit.Artifact())
    except LowBitError as error:
        return str(error)
    return "accepted"


def deepspeed_refused(rank: int, size: int, folders: list[Path]) -> list[str]:
    """What an engine says to artifacts of other models and sizes."""
    import megatron_lowbit as lowbit

    engine, messages = _engine("llama", size), []
    for folder in folders:
        try:
            lowbit.apply_to_deepspeed(engine, folder)
            messages.append("accepted")
        except LowBitError as error:
            messages.append(str(error))
    return messages


def deepspeed_generate(rank: int, size: int, folder: Path, new_tokens: int) -> Tensor:
    import tiny_models

    import megatron_lowbit as lowbit

    engine = lowbit.apply_to_deepspeed(_engine("llama", size), folder)
    ids = tiny_models.token_ids(2, 5)
    return engine.module.generate(input_ids=ids, max_new_tokens=new_tokens, do_sample=False)


def shared_memory_op(rank: int, size: int) -> tuple[bool, Any]:
    """(whether DeepSpeed thinks it may build the op, the op that its communication backend holds)."""
    from megatron_lowbit.adapters import deepspeed as adapter

    deepspeed = adapter.import_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    from deepspeed import comm

    return deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"], comm.comm.cdb.shm_comm_op


def agreements(rank: int, size: int, plan: SitePlan) -> dict[str, int]:
    """Broadcasts of a reducer's first call, of one with as many tokens, and of one with others; bytes of each."""
    reducer, counts = HybridReducer(plan, dist.group.WORLD), {}
    for name, tokens in (("first", 4), ("same", 4), ("other", 5)):
        with RecordedCollectives() as recorded:
            reducer.all_reduce(torch.zeros(tokens, 66))
        sent = [bytes_ for call, bytes_, _ in recorded.calls if call == "broadcast"]
        counts[name] = len(sent)
    return {**counts, "width": sent[0]}


def clipped_ranges(rank: int, size: int, windows: Tensor) -> Tensor | None:
    """Return statistics of windows [windows, length, features] that data-parallel ranks share."""
    observer = RangeObserver(1, windows.shape[2], 0.1, windows.device, histograms=True)
    for window in windows.view(-1, size, *windows.shape[1:]):
        mine = window[rank : rank + 1]
        observe(observer, [mine], torch.ones(mine.shape[:2], dtype=torch.bool), dist.group.WORLD)
    return observer.feature_range(dp_group=dist.group.WORLD).clipped


def drifting(
    rank: int,
    size: int,
    plan: SitePlan,
    calls: list[Tensor],
    mode: CommMode,
    threshold: float | None,
    scatter: bool = False,
) -> dict[str, Any]:
    """The sums of this rank's calls[i][rank]; what was logged; float64 all-reduces, which only the guard makes."""
    reducer, logged = HybridReducer(plan, dist.group.WORLD, mode, threshold), Logged()
    reducer.set_site("model.layers.0")
    logging.getLogger("megatron_lowbit").addHandler(logged)
    with RecordedCollectives() as recorded:
        sums = [(reducer.reduce_scatter if scatter else reducer.all_reduce)(partials[rank]) for partials in calls]
    logging.getLogger("megatron_lowbit").removeHandler(logged)
    checks = sum(call == "all_reduce" and dtype == "float64" for call, _, dtype in recorded.calls)
    counts = {"saturated": reducer.saturation().saturated, "values": reducer.traffic.values}
    return {"sums": sums, "logged": logged.lines, "checks": checks, **counts}


def extremes(
    rank: int, size: int, plan: SitePlan, cases: list[tuple[CommMode, Tensor]], costs: CostTable
) -> list[tuple[Tensor, Any]]:
    """(the sum, the counts) of every mode and its partial sums, in one call each and without falling back."""
    found = []
    for mode, partials in cases:
        reducer = HybridReducer(plan, dist.group.WORLD, mode, costs=costs)
        found.append((reducer.all_reduce(partials[rank]), reducer.saturation()))
    return found


class Logged(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def measured_costs(rank: int, size: int, plan: SitePlan, sizes: list[int]) -> CostTable:
    group = dist.group.WORLD
    assert group is not None
    return measure_costs(group, plan, sizes)


def dynamic_groups(rank: int, size: int, partials: list[Tensor]) -> dict[str, Any]:
    """This rank's sum of the peers' scheme and the bytes it handed over."""
    from megatron_lowbit.launch.bench.peers import GroupInt4

    group = dist.group.WORLD
    assert group is not None
    reducer = GroupInt4(group)
    return {"sum": reducer.all_reduce(partials[rank]), "bytes": reducer.traffic.bytes}
