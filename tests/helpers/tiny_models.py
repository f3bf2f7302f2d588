"""Tiny random models, the same bits in every process: hidden size 64, 2 blocks, 8 heads, 4 KV heads."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from megatron_lowbit import embedded
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.comm.calibration import calibrate
from megatron_lowbit.comm.plan import CalibrationStats
from megatron_lowbit.config import CommConfig, WeightsConfig
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.round_to_nearest import quantize_model
from megatron_lowbit.quant.weight_bits import Allocation

VOCAB = 128
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Ten times the usual 0.02: at 0.02 the residual stream is all embedding and no error of a block would show.
    "initializer_range": 0.2,
}
# {architecture: (config class, what differs)}. 172 inputs of down_proj are 43 for each of four ranks: a shard boundary
# inside a packed byte. head_dim 16 makes the attention (128) wider than the residual stream (64), as in Mistral NeMo.
CONFIGS = {
    "llama": (transformers.LlamaConfig, {"intermediate_size": 172}),
    "llama with biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"head_dim": 16}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
    "phi3": (transformers.Phi3Config, {}),
}
ARCHITECTURES = list(CONFIGS)
# {mixture of experts: the same}. Qwen's may have MLPs in some blocks, and their shares need not sum to 1. Qwen2-MoE has
# a shared expert besides.
MIXTURES = {
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 44,
            "norm_topk_prob": False,
        },
    ),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
    ),
}


def build(architecture: str, **changes: object) -> transformers.PreTrainedModel:
    """The model in float32, for inference; `changes` are config fields."""
    config_class, differing = (CONFIGS | MIXTURES)[architecture]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**_SHAPE, **differing, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # transformers starts them at 0 and 1, where they prove nothing
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


def token_ids(windows: int = 8, length: int = 6, seed: int = 1, vocab: int = VOCAB) -> Tensor:
    return torch.randint(3, vocab, (windows, length), generator=torch.Generator().manual_seed(seed))


Batches = list[tuple[Tensor, Tensor]]


def batches() -> Batches:
    """(ids, mask) as calibration takes them; the last window of every batch ends in padding."""
    made = []
    for number in range(3):
        ids, mask = token_ids(4, 12, seed=100 + number), torch.ones(4, 12, dtype=torch.bool)
        ids[-1, 7:], mask[-1, 7:] = 0, False
        made.append((ids, mask))
    return made


@torch.inference_mode()
def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    return model(input_ids=token_ids() if ids is None else ids).logits.clone()


def make_stats(model: nn.Module, tp_sizes: tuple[int, ...], text: Batches | None = None) -> CalibrationStats:
    """Calibration of virtual ranks in this process on `text` (none: on `batches()`)."""
    sites = huggingface.row_parallel_sites(model)
    return calibrate(model, sites, text or batches(), tp_sizes, huggingface.fingerprint(model), gamma=0.25)


def make_artifact(
    model: nn.Module, scheme: str = "none", tp_sizes: tuple[int, ...] = (), zero_point: str = "integer", **comm: object
) -> Artifact:
    """A checkpoint of `scheme` (unless none) and a plan for every one of `tp_sizes`, made in this process."""
    checkpoint = None
    if scheme != "none":
        linears = {name: linear for name, (_, linear) in huggingface.find_linears(model).items()}
        weights = WeightsConfig(scheme=scheme, zero_point=zero_point)
        checkpoint = quantize_model(model, linears, weights, huggingface.fingerprint(model))
    stats = make_stats(model, tp_sizes) if tp_sizes else None
    plans = {
        size: build_plan(stats, size, CommConfig(preset="paper", **comm)) for size in tp_sizes if stats is not None
    }
    return Artifact(checkpoint, plans)


def mixed_bits(model: nn.Module, scheme: str = "autoA8") -> LowBitCheckpoint:
    """Scheme auto with bits that no text has chosen: 2 to 8 in turn, the same for linears that share an input."""
    linears, groups = huggingface.find_linears(model), huggingface.sharing_bits(huggingface.find_linears(model))
    bits = {name: 2 + (3 * number) % 7 for number, group in enumerate(groups.values()) for name in group}
    config = WeightsConfig(scheme=scheme, budget=5)
    modules = {name: linear for name, (_, linear) in linears.items()}
    return quantize_model(model, modules, config, huggingface.fingerprint(model), None, Allocation(bits, 5.0, 0.125))


def save_artifact(artifact: Artifact, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in (artifact.checkpoint, *artifact.plans.values()):
        if part is not None:
            part.save(folder)
    return folder


def embedded_folder() -> Path:
    return Path(embedded.__file__).parent


@cache
def two_blocks() -> Path:
    """A folder of the embedded model's first two blocks of six, with its tokenizer: a third of the time."""
    folder = Path(tempfile.mkdtemp(prefix="lowbit-two-blocks-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        embedded_folder(), num_hidden_layers=2, dtype=torch.float32
    )
    model.save_pretrained(folder)
    return add_tokenizer(folder)


def save_model(architecture: str, folder: Path, **changes: object) -> Path:
    """A model folder with the embedded model's tokenizer, as the commands take it."""
    build(architecture, vocab_size=1024, bos_token_id=0, eos_token_id=1, **changes).save_pretrained(folder)
    return add_tokenizer(folder)


def add_tokenizer(folder: Path) -> Path:
    """Put the embedded model's tokenizer, of 1,024 tokens, into a model folder."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_folder() / name, folder)
    return folder


class FusedLinear(nn.Linear):
    """A linear of a type that adapters do not replace."""
