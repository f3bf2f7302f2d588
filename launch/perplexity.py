"""Perplexity and KL divergence of an engine on windows of text, which data-parallel copies of the model share.

A copy takes whole batches, in turn, so that each is computed in the shape in which one copy alone would: figures are
the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.config import EvaluationConfig
from megatron_lowbit.io.data import Windows
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.quality import Batch, Quality, WindowSums, measure_windows, summarize
from megatron_lowbit.runtime.distributed import PreemptionCheck, all_gather_values, group_rank, world_size
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import progress


def measure_perplexity(
    engine: Engine, windows: Windows, section: EvaluationConfig, name: str, reference: Tensor | None = None
) -> Quality:
    """Measure the engine as it is; a collective call. reference: this rank's log_probs of full precision, which KL is
    measured against."""
    copies, copy = world_size(engine.dp_group), group_rank(engine.dp_group)
    batches = list(windows.batches(section.batch_size))
    kl_tokens = _own_tokens(batches, section.kl_tokens, copies, copy) if _reports(engine) else 0
    sums = measure_windows(engine, _own(batches, copies, copy, name), kl_tokens, reference)
    parts = all_gather_values([sums.nll, sums.kl], engine.dp_group)
    nll, kl = ([(total, count) for part in parts for total, count in part[which]] for which in (0, 1))
    return summarize(WindowSums(nll, kl, sums.log_probs))


def _own(batches: Sequence[Batch], copies: int, copy: int, name: str) -> Iterator[Batch]:
    """Yield this copy's batches; all ranks ask the same number of times whether to stop, also where one has a batch
    less."""
    rounds = range(0, len(batches), copies)
    for first in progress(PreemptionCheck().each(rounds), len(rounds), f"evaluating {name}", env_rank()):
        yield from batches[first + copy : first + copy + 1]


def _own_tokens(batches: Sequence[Batch], kl_tokens: int, copies: int, copy: int) -> int:
    """Return how many of the text's first kl_tokens tokens are in this copy's batches, of which they are the first."""
    own = before = 0
    for number, (_, mask) in enumerate(batches):
        predicted = int((mask.sum(1) - 1).clamp_min(0).sum())
        if number % copies == copy:
            own += min(max(kl_tokens - before, 0), predicted)
        before += predicted
    return own


def _reports(engine: Engine) -> bool:
    """Tell whether this rank keeps log-probabilities: rank 0 alone, with copies the first rank of each; all others of
    a copy see the same logits."""
    return env_rank() == 0 if engine.dp_group is None else dist.get_global_rank(engine.dp_group, 0) == 0
