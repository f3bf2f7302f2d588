"""The output projection of a Hugging Face model in low bits: which module it is, its rounding, and what replaces it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.fingerprint import Fingerprint, bit_sum
from megatron_lowbit.layers.head import QuantEmbedding, QuantHead
from megatron_lowbit.quant.affine import QuantizedWeight
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.head import QuantizedHead, Texts, attach_head, make_head


@dataclass(frozen=True)
class HeadPlace:
    """The output projection's name and module in a model, and the name of the embedding that has the same weight."""

    name: str
    linear: nn.Linear
    embedding: str | None


def find_head(model: Any) -> HeadPlace:
    """Return a causal LM's output projection.

    Raises LowBitError where it, or the embedding that it is tied to, is another module than torch's own: nobody knows
    what else such a one computes.
    """
    linear, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(linear) is not nn.Linear:
        raise _refused(model, f"its output projection is {_kind(linear)}, not nn.Linear")
    tied = getattr(embedding, "weight", None) is linear.weight
    users = [name for name, p in model.named_parameters(remove_duplicate=False) if p is linear.weight]
    if len(users) != 1 + tied:
        raise _refused(model, f"{', '.join(users)} are one weight")
    if tied and (type(embedding) is not nn.Embedding or embedding.max_norm is not None):
        raise _refused(model, f"its embedding, tied to it, is {_kind(embedding)}, not a plain nn.Embedding")
    names = {id(module): name for name, module in model.named_modules()}
    return HeadPlace(names[id(linear)], linear, names[id(embedding)] if tied else None)


@torch.no_grad()
def quantize_head(model: Any, checkpoint: LowBitCheckpoint, bits: int, texts: Texts) -> LowBitCheckpoint:
    """Return the checkpoint of an unsharded, unpatched model with its output projection in `bits` bits.

    texts: what the KL divergence is measured on. Raises LowBitError where that is above the limit, and as find_head.
    """
    place = find_head(model)
    weight, bias = place.linear.weight.detach(), place.linear.bias

    def run(ids: Tensor) -> Tensor:
        return model(input_ids=ids.to(weight.device), use_cache=False).logits

    head = make_head(place.name, place.embedding, place.linear, weight, bias, bits, texts, run)
    check_runs(model, place, head.weight, lambda: run(torch.zeros(1, 2, dtype=torch.long)))
    return attach_head(checkpoint, head, int(bit_sum(weight)))


def head_modules(model: nn.Module, head: QuantizedHead) -> dict[str, nn.Module]:
    """Return {fqn: replacement} of the output projection and, where it is tied, the embedding.

    Every rank of a sharded model gets the whole projection. Raises LowBitError for a model without them.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    there = [len(head.weight.packed_weight), head.weight.in_features]
    for name in (head.name, *([] if head.embedding is None else [head.embedding])):
        if name not in modules:
            raise LowBitError(f"the model has no {name}, which the artifact has quantized; quantize this model again")
        # DeepSpeed's share has fewer rows or columns.
        here = list(getattr(modules[name], "_orig_weight_shape", modules[name].weight.shape))
        if here != there:
            raise LowBitError(
                f"{name} is {here} in the model and {there} in the artifact, which belongs to another model; quantize "
                "this one"
            )
    placed = QuantHead(head.weight, modules[head.name].bias)
    replacements: dict[str, nn.Module] = {head.name: placed}
    if head.embedding is not None:
        replacements[head.embedding] = QuantEmbedding(placed, modules[head.embedding].weight.dtype)
    return replacements


def check_runs(model: nn.Module, place: HeadPlace, weight: QuantizedWeight, run: Callable[[], Any]) -> None:
    """Run the model with `weight` in place, and put back what was there.

    Raises LowBitError where its code reads the projection's or the embedding's weight itself (Mamba, Llama 4): there is
    none any more, but codes.
    """
    replacements = head_modules(model, QuantizedHead(weight, place.name, place.embedding, 0.0, 1))
    originals = {name: model.get_submodule(name) for name in replacements}
    try:
        for name, module in replacements.items():
            model.set_submodule(name, module.to(place.linear.weight.device))
        run()
    except (AttributeError, LowBitError):
        raise _refused(model, "its code reads the weight of its output projection, or embedding, itself") from None
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


def with_head(here: Fingerprint, model: nn.Module, checkpoint: LowBitCheckpoint | None) -> Fingerprint:
    """Return a model's fingerprint with the output projection, where the checkpoint has one of its own to compare."""
    if checkpoint is None or checkpoint.head is None or checkpoint.head.name in here["weights"]:
        return here
    linear: Any = dict(model.named_modules()).get(checkpoint.head.name)
    if linear is None:
        return here
    return {**here, "weights": {**here["weights"], checkpoint.head.name: int(bit_sum(linear.weight.detach()))}}


def _kind(module: Any) -> str:
    return "missing" if module is None else type(module).__name__


def _refused(model: nn.Module, why: str) -> LowBitError:
    return LowBitError(f"weights.lm_head_bits does not know {type(model).__name__}: {why}; leave it out")
