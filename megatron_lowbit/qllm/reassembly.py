"""Adaptive channel reassembly: from channel statistics to a ReassemblyPlan (QLLM, arXiv 2310.08041, section 4.1).

Disassembly   An outlier channel is split into T = ceil(max|x| / theta) sub-channels of x / T; exact.         (eq. 3)
Assembly      As many channels as were added are merged into others, so that the width stays what it was.      (eq. 4)
              Bipartite soft matching (appendix A): the channels that were not split alternate between two sets A and B;
              each of A goes to its nearest in B; the shortest edges are merged, several into one B if need be.
Distance      Merging i and j replaces x_i W_i + x_j W_j by their mean times their sum. The error of that is
              (x_i - x_j)(W_i - W_j) / 2; summed over tokens and outputs it separates:

                  D(i, j) = 1/4 |x_i - x_j|^2 |W_i - W_j|^2,    |v_i - v_j|^2 = G_ii + G_jj - 2 G_ij

              so two Gram matrices say it exactly. (The official code adds the weights where it should subtract them.)
Threshold     Candidates are counts of added channels: theta lies between the breakpoints max|x_i| / t, and the n-th
              largest of them is where the n-th channel is added. The paper's grid of equal steps in theta spends most
              of them on equal counts. None at all is a candidate too; which one is best is for the block's output to
              say.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.config import ReassemblyConfig
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan


class ChannelStats:
    """Keep statistics of activations x [tokens, M]: max_abs float32 [M]; gram float64 [M, M], the sum of x^T x."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.max_abs = torch.zeros(features, device=device)
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        """Count the tokens of x [tokens, M]."""
        x = x.float()
        self.max_abs = torch.maximum(self.max_abs, x.abs().amax(0))
        self.gram += x.T @ x

    def all_reduce(self, dp_group: dist.ProcessGroup | None) -> None:
        """Make them those of all data-parallel ranks' tokens."""
        if dp_group is not None:
            dist.all_reduce(self.max_abs, dist.ReduceOp.MAX, dp_group)
            dist.all_reduce(self.gram, group=dp_group)


def squared_distances(gram: Tensor) -> Tensor:
    """Return |v_i - v_j|^2 [M, M] from the Gram matrix of v [M, M]."""
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp_(min=0)


def merge_error(x_gram: Tensor, weight_gram: Tensor) -> Tensor:
    """Return D(i, j) [M, M]: the squared output error, over all tokens and outputs, of merging channels i and j."""
    return squared_distances(x_gram) * squared_distances(weight_gram) / 4


def threshold_for(max_abs: Tensor, added: int) -> float:
    """Return the theta that adds `added` channels (fewer where they tie): between two breakpoints max|x_i| / t."""
    added = max(added, 1)
    widest = max_abs.float().topk(min(added + 1, len(max_abs))).values
    steps = torch.arange(1, added + 2, device=max_abs.device)
    breakpoints = (widest[:, None] / steps).flatten().topk(added + 1).values
    return ((breakpoints[-2] + breakpoints[-1]) / 2).item()


def num_splits(max_abs: Tensor, threshold: float) -> Tensor:
    """Return T = ceil(max|x| / theta), int64 [M], at least 1."""
    if threshold <= 0:
        return torch.ones_like(max_abs, dtype=torch.int64)
    return torch.ceil(max_abs / threshold).to(torch.int64).clamp_(min=1)


def split_counts(max_abs: Tensor, added: int) -> Tensor:
    """Return T of every channel, int64 [M], that adds exactly `added`: T at threshold_for, with ties broken by index.

    Exactly, because all shards of a row-parallel input have to stay of one width.
    """
    steps = torch.arange(1, added + 1, device=max_abs.device)
    breakpoints = (max_abs.float()[:, None] / steps).flatten()
    widest = breakpoints.argsort(descending=True, stable=True)[:added]
    return 1 + torch.bincount(widest // added, minlength=len(max_abs))


def match(distance: Tensor, channels: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Return the `count` shortest edges (source, target) of bipartite soft matching; None where set A is smaller."""
    a, b = channels[0::2], channels[1::2]
    if count > len(a) or len(b) == 0:
        return None
    shortest, nearest = distance[a][:, b].min(1)
    chosen = shortest.argsort(stable=True)[:count]
    return a[chosen], b[nearest[chosen]]


def build_plan(max_abs: Tensor, threshold: float, distance: Tensor | None) -> ReassemblyPlan | None:
    """Split at `threshold`, then merge as many channels as that added.

    distance: D [M, M], or None to split only, which leaves a plan wider than its input. Sub-channels are never merged.
    Returns None where too few unsplit channels remain to pay for the split ones.
    """
    return plan_of(num_splits(max_abs, threshold), distance)


def plan_of(splits: Tensor, distance: Tensor | None) -> ReassemblyPlan | None:
    """Split every channel into `splits` sub-channels, int64 [M], then merge as many channels as that added.

    distance, returns: see build_plan.
    """
    features = len(splits)
    added = int(splits.sum()) - features
    outputs = splits.clone()  # channels of x' that start with this channel of x
    members = torch.ones_like(splits)
    source = target = splits.new_empty(0)
    if distance is not None and added > 0:
        edges = match(distance, (splits == 1).nonzero().squeeze(1), added)
        if edges is None:
            return None
        in_order = edges[0].argsort()  # a group is summed in the order of its channels
        source, target = edges[0][in_order], edges[1][in_order]
        outputs[source] = 0
        members.index_add_(0, target, torch.ones_like(target))
    first = outputs.cumsum(0) - outputs  # where each channel's outputs start
    width = int(outputs.sum())
    src = torch.repeat_interleave(torch.arange(features, device=splits.device), outputs)
    share = 1.0 / (splits * members).float()  # 1/T or 1/|G|: no channel is both
    src_idx = torch.cat([src, source])
    dst_idx = torch.cat([torch.arange(width, device=src.device), first[target]])
    coefficient = torch.cat([share[src], share[target]])
    return ReassemblyPlan(src_idx, dst_idx, coefficient, features, width)


def candidate_plans(stats: ChannelStats, weight_gram: Tensor, config: ReassemblyConfig) -> list[ReassemblyPlan]:
    """Return the distinct plans among which the block's output chooses, the identity first.

    For mode=fixed there is one: the given expansion, or the identity where too few channels are left to merge.
    """
    features = len(stats.max_abs)
    identity = ReassemblyPlan.identity(features).to(stats.max_abs.device)
    expansions = (config.expansion,) if config.mode == "fixed" else config.expansions
    distance = merge_error(stats.gram, weight_gram) if config.merge else None
    plans = [] if config.mode == "fixed" else [identity]
    for added in sorted({max(1, round(ratio * features)) for ratio in expansions}):
        plan = plan_of(split_counts(stats.max_abs, added), distance)
        if plan is not None:
            plans.append(plan)
    return plans or [identity]
