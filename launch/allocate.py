"""Scheme auto of `quantize`: how many bits each linear gets, estimated on calibration.data (quant/rounding_costs.py).

The estimate is made window by window on rank 0, which holds the whole model for it. <output_dir>/weight_bits.json keeps
what is done and what it belongs to, and is replaced at once: a killed run continues there, and another weights.budget,
or another number of bits for activations, needs no new estimate.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface.skeleton import skeleton
from megatron_lowbit.config import LowBitError, QuantizeConfig, defaults
from megatron_lowbit.io.data import Windows
from megatron_lowbit.io.files import check_seal, read_json, write_sealed
from megatron_lowbit.io.hf_weights import HFWeights
from megatron_lowbit.launch.inputs import model_name
from megatron_lowbit.launch.loading import compute_dtype, load_model
from megatron_lowbit.launch.model_folder import download
from megatron_lowbit.launch.tables import print_table
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.rounding_costs import Costs, window_costs
from megatron_lowbit.quant.weight_bits import CANDIDATES, Allocation, choose_bits
from megatron_lowbit.runtime.distributed import PreemptionCheck, device, on_rank_zero
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger, progress
from megatron_lowbit.runtime.say import say

WINDOWS, LENGTH = 16, 512  # of calibration.data: its first windows, and their first tokens
FILE = "weight_bits.json"
STATE = 1  # counts the changes of what the file holds


class RoundingCosts:
    """Accumulate the costs of rounding a model's linears. All methods are called on rank 0 alone.

    load(): the model in full precision, called where there is something left to do. done: how many of the windows have
    been added.
    """

    def __init__(self, config: QuantizeConfig, windows: Windows, load: Callable[[], Any]):
        self.config, self.load = config, load
        self.path = Path(config.output_dir) / FILE
        self.text = Windows(windows.ids[:WINDOWS, :LENGTH], windows.mask[:WINDOWS, :LENGTH])
        self.settings: dict[str, Any] = {}
        self.model: Any = None
        self.groups: dict[str, list[str]] = {}  # {its first linear: all linears that get one number of bits}
        self.sizes: dict[str, int] = {}  # {group: weights}
        self.sums: Costs = {}  # of groups, over all tokens so far
        self.done = 0

    def start(self) -> int:
        """Take over what an earlier run of the same settings has left; returns how many windows it has done.

        A file of other settings, or a damaged one, is made anew.
        """
        keys = (
            *("dtype", "seed", "inject_outliers", "inject_at"),
            *("weights.symmetric", "weights.zero_point", "weights.group_size"),
        )
        given = defaults(self.config)
        named = {
            "state": STATE,
            "model's weights": HFWeights(download(model_name(self.config.model or ""))).digest(),
            "calibration.data's tokens": self.text.digest(),
        }
        settings = {**named, **{key: given[key] for key in keys}, "dtype": str(compute_dtype(self.config))}
        self.settings = json.loads(json.dumps(settings))
        with contextlib.suppress(LowBitError):
            found = read_json(self.path)
            check_seal(self.path, found)
            if found.get("settings") == self.settings:
                self.done, self.groups, self.sizes = found["windows"], found["groups"], found["sizes"]
                self.sums = found["costs"]
        if 0 < self.done < len(self.text.ids):
            say(f"continuing after {self.done} of the {len(self.text.ids)} windows")
        return self.done

    def add(self) -> None:
        """Add the next window's, and write the file."""
        if self.model is None:
            self.model = self.load().to(device())
        found = huggingface.find_linears(self.model)
        linears = {name: linear for name, (_, linear) in found.items()}
        if not self.groups:
            self.groups = {name: list(group) for name, group in huggingface.sharing_bits(found).items()}
            self.sizes = {name: sum(linears[n].weight.numel() for n in group) for name, group in self.groups.items()}
            self.sums = {name: [0.0] * len(CANDIDATES) for name in self.groups}
        ids = self.text.ids[self.done][self.text.mask[self.done]].unsqueeze(0).to(device())
        costs = window_costs(self.model, linears, ids, self.config.seed + self.done, self.config.weights)
        for name, group in self.groups.items():
            rows = [self.sums[name], *(costs[linear] for linear in group)]
            self.sums[name] = [sum(of_bits) for of_bits in zip(*rows, strict=True)]
        self.done += 1
        about = {"windows": self.done, "groups": self.groups, "sizes": self.sizes, "costs": self.sums}
        write_sealed(self.path, {"settings": self.settings, **about})

    def choose(self, budget: float) -> dict[str, Any]:
        """Return the description of the Allocation that costs least."""
        tokens = int(self.text.mask[: self.done].sum())
        costs = {name: [cost / tokens for cost in row] for name, row in self.sums.items()}
        bits, kl = choose_bits(self.sizes, costs, budget)
        of_linears = {linear: bits[name] for name, group in self.groups.items() for linear in group}
        return Allocation(of_linears, budget, kl).describe()


def allocate(config: QuantizeConfig, windows: Windows, load: Callable[[], Any], logger: MetricLogger) -> Allocation:
    """Choose the bits of every linear, continuing where an earlier run of the same settings stopped.

    All ranks call it. load() returns the model in full precision, on rank 0. Raises LowBitError for NaN or Inf in the
    model, and Preempted.
    """
    budget = config.weights.budget
    assert budget is not None, "the config asks for it"
    costs = RoundingCosts(config, windows, load)
    done, total, watch = on_rank_zero(costs.start), len(costs.text.ids), PreemptionCheck()
    for number in progress(range(done, total), total - done, "estimating what rounding costs", env_rank()):
        watch.check(f"after {number} of {total} windows; the same command continues there")
        on_rank_zero(costs.add)
    watch.close()
    allocation = Allocation(**on_rank_zero(lambda: costs.choose(budget)))
    logger.log(weight_bits_kl=allocation.kl)
    return allocation


def load_whole(config: QuantizeConfig, hf_config: Any) -> Any:
    """Return the whole model for the estimate, on the CPU. Raises LowBitError where it does not fit in memory."""
    dtype = compute_dtype(config)
    needed = dtype.itemsize * sum(parameter.numel() for parameter in skeleton(hf_config, dtype).parameters())
    free = free_memory()
    if needed > free:
        raise LowBitError(
            f"weights.scheme={config.weights.scheme} holds the whole model in memory to choose bits, "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; choose a scheme of equal bits (W4A8)"
        )
    return load_model(config, hf_config, None).eval()


def free_memory() -> int:
    """Return the bytes that a model on this rank's device can take."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def tell_bits(checkpoint: LowBitCheckpoint) -> None:
    """Print how many linears have how many bits, and what they take."""
    allocation = checkpoint.allocation
    assert allocation is not None, "of scheme auto"
    rows = []
    for bits in sorted(set(allocation.bits.values())):
        linears = [weight for weight in checkpoint.linears.values() if weight.num_bits == bits]
        weights = sum(len(weight.packed_weight) * weight.in_features for weight in linears)
        packed = sum(weight.packed_weight.nbytes for weight in linears)
        rows.append((str(bits), str(len(linears)), f"{weights:,}", f"{packed:,}"))
    total = sum(len(w.packed_weight) * w.in_features for w in checkpoint.linears.values())
    mean = 8 * checkpoint.ideal_bytes() / total
    kl = f"rounding them is estimated to cost a KL of {allocation.kl:.5f} nats per token"
    say(f"{mean:.3f} bits per weight, {allocation.budget:g} at most; {kl}")
    print_table(("bits", "linears", "weights", "bytes of codes"), rows)
