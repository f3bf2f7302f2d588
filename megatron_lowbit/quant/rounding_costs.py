"""What rounding a linear's weight to b bits costs, estimated for all linears and all b in one backward pass per window.

The KL divergence of the rounded model from the full-precision one is, to second order in the error D = Q_b(W) - W,

    KL = 1/2 E (g . D)^2 = 1/2 sum_i E g_i^2 D_i^2             g = grad_W sum_t log p(y_t | x_<=t),   y_t ~ p

per window: the Fisher information, since the labels y are drawn from the model itself, and its diagonal, since the
errors of different weights are uncorrelated. NVIDIA ModelOpt's auto_quantize scores so too, with the text's own labels.
Measuring the KL itself takes a forward pass for every linear and every b: it ranks alike (docs/qllm.md) and takes
twenty times as long on a small model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lowbit.config import LowBitError, WeightsConfig
from megatron_lowbit.quant.affine import fake_quantize
from megatron_lowbit.quant.weight_bits import CANDIDATES

Costs = dict[str, list[float]]  # {linear: KL in nats at each of CANDIDATES bits, summed over tokens}


def window_costs(model: Any, linears: Mapping[str, nn.Linear], ids: Tensor, seed: int, config: WeightsConfig) -> Costs:
    """Return the cost of rounding each of `linears`, summed over the tokens of one window.

    model: a causal LM of transformers in full precision, unpatched; ids: int64 [1, tokens]; seed: of the labels;
    config: how weights are rounded. The gradient of one weight at a time is in memory. Raises LowBitError for NaN or
    Inf.
    """
    costs: Costs = {name: [0.0] * len(CANDIDATES) for name in linears}  # of one that does not run

    def take(name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        costs[name] = _second_order(weight.detach().float(), weight.grad.float(), config)
        weight.grad = None

    # Several threads add up a weight's gradient in another order, and ranks of one machine have fewer each.
    with (
        _one_thread(),
        torch.enable_grad(),
        _gradients(model, {name: linear.weight for name, linear in linears.items()}, take),
    ):
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        log_probs = logits.log_softmax(-1)
        if not torch.isfinite(log_probs.sum()):
            raise LowBitError("the model's logits hold NaN or Inf; check its weights and dtype")
        generator = torch.Generator().manual_seed(seed)
        labels = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator)
        log_probs.gather(1, labels.to(log_probs.device)).sum().backward()
    broken = [name for name, found in costs.items() if not all(map(math.isfinite, found))]
    if broken:
        raise LowBitError(f"{broken[0]} or its gradient holds NaN or Inf; check the model's weights and dtype")
    return costs


def _second_order(weight: Tensor, gradient: Tensor, config: WeightsConfig) -> list[float]:
    """Return 1/2 sum (g D)^2 at each of CANDIDATES bits."""
    costs, how = [], (config.symmetric, config.group_size)
    for bits in CANDIDATES:
        error = fake_quantize(weight, bits, *how, real_zero=config.real_zero).sub_(weight)
        costs.append(0.5 * math.fsum(error.mul_(gradient).square_().sum(1, dtype=torch.float64).tolist()))
    return costs


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have what runs on a CPU run in one thread within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _gradients(model: nn.Module, weights: Mapping[str, Tensor], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Have `take` called with each of `weights`, alone among the parameters, when a backward pass has its gradient."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    handles = []
    try:
        for name, weight in weights.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(lambda w, name=name: take(name, w)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = None
