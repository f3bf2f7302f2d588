"""Keep a correction only where it gains something beside GPTQ.

Codes that are nearest to corrected weights, and codes that GPTQ chooses, make up for the same errors. So a correction
that lowers the loss of weights rounded to nearest (correct_group.py) may gain nothing once GPTQ has chosen the codes,
or do harm. The held-out windows decide between two whole results: GPTQ's codes of the weights as they are, and of the
corrected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_lowbit.qllm.correct_group import CorrectionResult, TrainedGroup
from megatron_lowbit.qllm.sharded_linear import ShardedLinear


def correct_before_gptq(
    linears: Sequence[ShardedLinear],
    correct: Callable[[], tuple[CorrectionResult, TrainedGroup | None]],
    choose_codes: Callable[[], None],
    loss: Callable[[], float],
) -> CorrectionResult:
    """Correct a group's linears and choose their codes; without the correction where the loss is not smaller with it.

    correct: correct_group. choose_codes: GPTQ for all linears, with the weights they have at that moment. loss: of the
    held-out windows, as the group computes at that moment. All of them are collective calls where ranks share a group.
    """
    choose_codes()
    without, codes = loss(), [linear.take_codes() for linear in linears]
    result, trained = correct()
    if trained is not None:
        choose_codes()
        result.gptq_losses = [without, loss()]
        if result.gptq_losses[1] < without:
            return result
        trained.give_up()
        result.kept_epoch = None
    for linear, chosen in zip(linears, codes, strict=True):
        linear.put_codes(chosen)
    return result
