"""Cases of a RankPool around DeepSpeed: readers of norms, copies, saved folders, engines of deepspeed.initialize."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from rank_cases import _engine
from torch import nn

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.deepspeed import init_engine
from megatron_lowbit.config import CommConfig, LowBitError
from megatron_lowbit.layers.experts import QuantExperts

# The plans of these tests know four windows: of other tokens, too many values lie beyond their ranges.
EVERY_SITE = CommConfig(drift_threshold=None)


def message_of(action: Any) -> str:
    """What a call refuses; "accepted" where it does not."""
    try:
        action()
    except LowBitError as error:
        return str(error)
    return "accepted"


def other_readers(rank: int, size: int, folder: Path, name: str) -> dict[str, Any]:
    """Logits of an engine whose column-parallel linear `name` is of a type that the adapter does not know."""
    from deepspeed.module_inject import layers

    engine = _engine("llama", size)
    engine.module.get_submodule(name).__class__ = type("FusedLinearLayer", (layers.LinearLayer,), {})
    before = tiny_models.logits(engine.module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lowbit.apply_to_deepspeed(engine, folder)
    patched = tiny_models.logits(engine.module)
    lowbit.remove(engine)
    removed = torch.equal(tiny_models.logits(engine.module), before)
    return {"logits": patched, "warnings": [str(warning.message) for warning in caught], "removed": removed}


def copies(rank: int, size: int, folder: Path, target: Path) -> dict[str, Any]:
    """A copy of a patched engine's module, removed; what pickling says; the folder that save_pretrained writes."""
    engine = _engine("llama", size)
    plain = tiny_models.logits(engine.module)
    patched = tiny_models.logits(lowbit.apply_to_deepspeed(engine, folder).module)
    twin = copy.deepcopy(engine.module)
    results = {"copied": torch.equal(tiny_models.logits(twin), patched)}
    lowbit.remove(twin)
    results["removed"] = torch.equal(tiny_models.logits(twin), plain)
    results["kept"] = torch.equal(tiny_models.logits(engine.module), patched)
    results["pickle"] = message_of(lambda: pickle.dumps(engine.module))
    engine.module.save_pretrained(target)
    return {**results, "logits": patched}


def quantized_head(rank: int, size: int, folder: Path, tied: bool) -> dict[str, Any]:
    """Logits of an engine whose output projection is quantized, and whether remove restores it."""
    from megatron_lowbit.adapters import deepspeed as adapter

    adapter.import_deepspeed().init_distributed(dist_backend="gloo", verbose=False)
    engine = adapter.init_engine(tiny_models.build("llama", tie_word_embeddings=tied), size, torch.float32)
    plain, head = tiny_models.logits(engine.module), engine.module.lm_head
    patched = tiny_models.logits(lowbit.apply_to_deepspeed(engine, folder, EVERY_SITE).module)
    kinds = type(head).__name__, type(engine.module.lm_head).__name__
    lowbit.remove(engine)
    removed = engine.module.lm_head is head and torch.equal(tiny_models.logits(engine.module), plain)
    head.weight.data[0, 0] += 1
    other = message_of(lambda: lowbit.apply_to_deepspeed(engine, folder, EVERY_SITE))
    return {"logits": patched, "kinds": kinds, "removed": removed, "other": other}


def rotated(rank: int, size: int, folder: Path, architecture: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Logits of an engine of a rotated artifact, the type of its output projection, and whether remove restores it."""
    from megatron_lowbit.adapters import deepspeed as adapter

    adapter.import_deepspeed().init_distributed(dist_backend="gloo", verbose=False)
    engine = adapter.init_engine(tiny_models.build(architecture, **changes), size, torch.float32)
    plain = tiny_models.logits(engine.module)
    patched = tiny_models.logits(lowbit.apply_to_deepspeed(engine, folder, EVERY_SITE).module)
    kind = type(engine.module.lm_head).__name__
    lowbit.remove(engine)
    return {"logits": patched, "kind": kind, "removed": torch.equal(tiny_models.logits(engine.module), plain)}


def piped(model: nn.Module, prompts: list[str], other: nn.Module | None = None) -> list[str]:
    """What a text-generation pipeline of the embedded model says, greedily; other: takes the model's place in it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_models.embedded_folder())
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    if other is not None:
        pipe.model = other
    return [pipe(prompt, max_new_tokens=8, do_sample=False)[0]["generated_text"] for prompt in prompts]


def embedded_model() -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_models.embedded_folder()).eval()


def pipeline(rank: int, size: int, folder: Path, prompts: list[str]) -> list[str]:
    """As `piped`, of a patched engine's module."""
    from megatron_lowbit.adapters import deepspeed as adapter

    adapter.import_deepspeed().init_distributed(dist_backend="gloo", verbose=False)
    engine = adapter.init_engine(embedded_model(), size, torch.float32)
    return piped(embedded_model(), prompts, lowbit.apply_to_deepspeed(engine, folder).module)


def arguments(rank: int, size: int, folder: Path) -> list[str]:
    """What apply_to_deepspeed says to slips."""
    engine = _engine("llama", size)
    slips = [
        lambda: lowbit.apply_to_deepspeed(folder, engine),
        lambda: lowbit.apply_to_deepspeed(engine, engine),
        lambda: lowbit.apply_to_deepspeed(tiny_models.build("llama"), folder),
        lambda: lowbit.apply_to_deepspeed(engine, folder, "twoshot"),
    ]
    return [message_of(slip) for slip in slips]


def _initialize(model: nn.Module, stage: int, learning_rate: float | None, **config: Any) -> Any:
    """An engine of deepspeed.initialize; its optimizer has what can be trained. No learning rate: no optimizer."""
    import deepspeed

    given = {}
    if learning_rate is not None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        given["optimizer"] = torch.optim.AdamW(trained, learning_rate)
    settings = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=model, config=settings | config, **given)[0]


def _train(engine: Any, ids: torch.Tensor, steps: int) -> list[float]:
    engine.train()
    losses = []
    for _ in range(steps):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def initialized_engines(rank: int, size: int, weights: Path, plans: Path, folder: Path) -> dict[str, Any]:
    """Training under ZeRO, each rank on its own text, then AutoTP of deepspeed.initialize. (In this order: once a
    process has used AutoTP, DeepSpeed shards every later model.)"""
    from megatron_lowbit.adapters import deepspeed as adapter

    adapter.import_deepspeed().init_distributed(dist_backend="gloo", verbose=False)
    results: dict[str, Any] = {}
    for stage in (1, 3):
        model = lowbit.apply_to_huggingface(tiny_models.build("llama"), weights, 2, EVERY_SITE)
        engine = _initialize(model, stage, 1e-2)
        ids = tiny_models.token_ids(seed=1 + rank)
        results[f"losses {stage}"] = _train(engine, ids, 4)
        results[f"save_16bit_model {stage}"] = message_of(lambda engine=engine: engine.save_16bit_model(str(folder)))
        engine.save_checkpoint(str(folder / str(stage)))
        goes_on = _train(engine, ids, 2)
        engine.load_checkpoint(str(folder / str(stage)))
        results[f"resumed {stage}"] = _train(engine, ids, 2) == goes_on
        if stage == 3:
            results["zero 3"] = [
                message_of(lambda engine=engine: lowbit.apply_to_deepspeed(engine, weights)),
                message_of(lambda model=model: model.save_pretrained(folder / "spread")),
            ]
    shared = {"tensor_parallel": {"autotp_size": size}}
    engine = _initialize(tiny_models.build("llama"), 0, None, **shared)
    engine.module.eval()
    plain = tiny_models.logits(engine.module)
    results["logits"] = tiny_models.logits(lowbit.apply_to_deepspeed(engine, weights, EVERY_SITE).module)
    results["save_16bit_model"] = message_of(lambda: engine.save_16bit_model(str(folder / "half")))
    lowbit.remove(engine)
    results["removed"] = torch.equal(tiny_models.logits(engine.module), plain)
    engine.save_16bit_model(str(folder / "half"))
    engine = _initialize(tiny_models.build("llama"), 0, 1e-2, **shared)
    results["optimizer"] = message_of(lambda: lowbit.apply_to_deepspeed(engine, weights))
    lowbit.apply_to_deepspeed(engine, plans, EVERY_SITE)
    results["losses of the plan"] = _train(engine, tiny_models.token_ids(), 4)
    return results


def experts(rank: int, size: int, model: Path, artifact: Path) -> dict[str, Any]:
    """Logits of an engine of a mixture of experts, patched; the class of its experts; whether remove restores it."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    engine = init_engine(hf, size, torch.float32)
    before = tiny_models.logits(engine.module)
    lowbit.apply_to_deepspeed(engine, artifact, "native")
    patched = tiny_models.logits(engine.module)
    quantized = sum(isinstance(module, QuantExperts) for module in engine.module.modules())
    lowbit.remove(engine)
    return {"logits": patched, "experts": quantized, "removed": torch.equal(tiny_models.logits(engine.module), before)}
