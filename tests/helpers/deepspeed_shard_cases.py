"""Cases of a RankPool: models that DeepSpeed's AutoTP shards in each of its ways, with an artifact in them.

(entry, settings)   init_inference | initialize | tp_model_init, and what of tensor_parallel and ZeRO is set
"""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

import family_models
import tiny_models
import torch
from deepspeed_cases import EVERY_SITE, message_of
from recorded_collectives import RecordedCollectives
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import megatron_lowbit as lowbit


class YuanAttention(nn.Module):
    """Attention of Yuan 2, whose heads share the projections of Q and K: each pair of neighbouring heads of [q | k] is
    one head's Q and K. V's heads are in order, so a rank with a share of q and k needs others of V's heads."""

    def __init__(self, config: Any):
        super().__init__()
        self.head_dim, hidden = config.hidden_size // config.num_attention_heads, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))

    def forward(self, hidden_states: Tensor, **others: Any) -> tuple[Tensor, None]:
        shape = hidden_states.shape[:2]
        both = torch.cat([self.q_proj(hidden_states), self.k_proj(hidden_states)], -1)
        q, k = both.view(*shape, -1, 2 * self.head_dim).chunk(2, -1)
        v = self.v_proj(hidden_states).view(*shape, -1, self.head_dim)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(*shape, -1)), None


class YuanForCausalLM(LlamaForCausalLM):
    def __init__(self, config: Any):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn = YuanAttention(config)


def build(family: str, **changes: Any) -> Any:
    """A tiny model: "yuan", or of family_models.py; "tiny llama" is that of tiny_models.py."""
    if family == "tiny llama":
        return tiny_models.build("llama", **changes)
    if family != "yuan":
        return family_models.build(family, **changes)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
    model = YuanForCausalLM(LlamaConfig(**shape, vocab_size=128, pad_token_id=0))
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else 0.2)
    return model.eval()


def engine_of(entry: str, model: Any, size: int, settings: dict[str, Any]) -> Any:
    """What a way into DeepSpeed returns. settings: of tensor_parallel; `stage` of ZeRO, `learning_rate` of AdamW."""
    from megatron_lowbit.adapters import deepspeed as adapter

    deepspeed = adapter.import_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    if entry == "init_inference":
        return adapter.init_engine(model, size, torch.float32)
    settings = dict(settings)
    stage, rate, compiled = (settings.pop(key, None) for key in ("stage", "learning_rate", "compile"))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8,
        # By default stage 3 leaves parameters of fewer than 100,000 values on every rank: all of these models'.
        "zero_optimization": {"stage": stage or 0, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if compiled:
        config["compile"] = compiled
    given = {} if rate is None else {"optimizer": torch.optim.AdamW(model.parameters(), rate)}
    if entry == "tp_model_init":
        model = deepspeed.tp_model_init(model, size, torch.float32)
    elif entry == "initialize":
        config["tensor_parallel"] = {"autotp_size": size, **settings}
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        engine = deepspeed.initialize(model=model, config=config, **given)[0]
    engine.module.eval()
    from deepspeed.runtime.tensor_parallel import init_utils

    init_utils._TP_MODEL_INIT_ARGS = None  # else every later model has to agree with it
    return engine


def kinds(model: nn.Module) -> dict[str, int]:
    """How many modules there are of every type of AutoTP's and of ours."""
    found: dict[str, int] = {}
    for module in model.modules():
        ours = type(module).__module__.startswith("megatron_lowbit.layers.")
        if ours or type(module).__module__ == "deepspeed.module_inject.layers":
            found[type(module).__name__] = found.get(type(module).__name__, 0) + 1
    return found


def logits(engine: Any) -> Tensor:
    """Logits, with each rank's part of the vocabulary beside the others where the engine leaves them apart."""
    y = tiny_models.logits(engine.module)
    if "VocabParallelLinear" not in kinds(engine.module):
        return y
    parts = [torch.empty_like(y) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, y)
    return torch.cat(parts, -1)


def artifacts(
    rank: int, size: int, family: str, changes: dict[str, Any], entry: str, settings: dict[str, Any], folders: Any
) -> dict[str, Any]:
    """Logits of one sharded model: as it is, with each of {name: (folder or None, comm_mode)} in turn, and removed."""
    engine = engine_of(entry, build(family, **changes), size, settings)
    results: dict[str, Any] = {"host kinds": kinds(engine.module), "host": logits(engine), "warnings": []}
    for name, (folder, mode) in folders.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            given = engine.module if "in the module" in name else engine
            assert lowbit.apply_to_deepspeed(given, folder or lowbit.Artifact(), mode or EVERY_SITE) is given
        results["warnings"] += [str(w.message) for w in caught if "full precision" in str(w.message)]
        results[name], results[f"{name} kinds"] = logits(engine), kinds(engine.module)
        with RecordedCollectives() as recorded:
            logits(engine)
        results[f"{name} calls"] = recorded.calls
    lowbit.remove(engine)
    results["removed"] = torch.equal(logits(engine), results["host"]) and kinds(engine.module) == results["host kinds"]
    return results


def refusal(
    rank: int, size: int, family: str, changes: dict[str, Any], entry: str, settings: dict[str, Any], given: Any
) -> list[str]:
    """What is said of each (folder, comm_mode, "engine" or "module"); the model's parts are as before."""
    engine = engine_of(entry, build(family, **changes), size, settings)
    before = [id(module) for module in engine.module.modules()]
    said = []
    for folder, mode, what in given:
        target = engine if what == "engine" else engine.module
        said.append(message_of(lambda t=target, f=folder, m=mode: lowbit.apply_to_deepspeed(t, f, m or EVERY_SITE)))
        assert [id(module) for module in engine.module.modules()] == before, "a refusal has changed the model"
    return said


def trained(rank: int, size: int, plans: Path, stage: int) -> dict[str, Any]:
    """Losses of TP training with low-bit partial sums under ZeRO, and without."""
    results = {}
    for name in ("host", "low-bit"):
        settings = {"stage": stage, "learning_rate": 1e-2}
        engine = engine_of("initialize", tiny_models.build("llama"), size, settings)
        if name == "low-bit":
            lowbit.apply_to_deepspeed(engine, plans, EVERY_SITE)
        engine.train()
        ids, losses = tiny_models.token_ids(), []
        for _ in range(4):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        results[name], results[f"{name} kinds"] = losses, kinds(engine.module)
    return results


def two_pairs(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """As `artifacts`, of four ranks: two by tensor parallelism, two by ZeRO stage 3."""
    engine = engine_of("initialize", tiny_models.build("llama"), 2, {"stage": 3})
    weight = engine.module.model.layers[0].mlp.down_proj.weight
    results: dict[str, Any] = {"empty": weight.numel() == 0 and weight.ds_tensor.numel() == 64 * 86 // 2}
    before = tiny_models.logits(engine.module)
    lowbit.apply_to_deepspeed(engine, folder, EVERY_SITE)
    results["logits"] = tiny_models.logits(engine.module)
    results["removed"] = torch.equal(tiny_models.logits(lowbit.remove(engine).module), before)
    return results


def compiled_after(rank: int, size: int, folder: Path) -> str:
    """What engine.compile says of a model that was patched by its module; the engine would have been refused."""
    compiled = {"deepcompile": True, "passes": ["autotp"]}
    engine = engine_of("initialize", tiny_models.build("llama"), size, {"compile": compiled})
    lowbit.apply_to_deepspeed(engine.module, folder, EVERY_SITE)
    return message_of(lambda: engine.compile(backend="eager"))


def gradients(rank: int, size: int, folder: Path) -> dict[str, Tensor]:
    """Gradients of all that a patched engine's loss can train on this rank."""
    engine = engine_of("initialize", build("tiny llama"), size, {"autotp_size": size})
    module = lowbit.apply_to_deepspeed(engine, folder, "native").module
    module.requires_grad_(True)
    ids = tiny_models.token_ids(length=12)
    module(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
