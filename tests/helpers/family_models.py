"""Tiny random causal LMs of every text family in transformers that a config class can make: two blocks, 64 channels."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import embedded_folder
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    # Ten times the usual 0.02, so that an error of a block shows beside the embeddings.
    "initializer_range": 0.2,
    # Latent attention.
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "expert_ffn_hidden_size": 32,
    # State spaces and linear attention.
    "state_size": 16,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
# {model type: what differs}
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"head_dim": 32},
    "apertus": {},
    "arcee": {},
    "bamba": {"attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8, "n_ctx": 128},
    "cohere": {},
    "cohere2": {},
    "cpmant": {"dim_head": 16, "dim_ff": 96},
    "ctrl": {"dff": 96},
    "cwm": {},
    "deepseek_v2": {"num_key_value_heads": 4, "topk_method": "greedy"},
    "deepseek_v3": {"num_key_value_heads": 4},
    "diffllama": {},
    "doge": {},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_k": 2},
    "exaone4": {},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 96},
    "falcon_h1": {"mamba_d_ssm": 128},
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 1024,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "intermediate_size": [96, 96],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 8},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hyperclovax": {},
    "jais2": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "jetmoe": {"kv_channels": 16, "num_key_value_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama": {},
    "llama4_text": {"interleave_moe_layer_step": 2, "attn_scale": 0.1},
    "longcat_flash": {
        **{"num_key_value_heads": 4, "ffn_hidden_size": 96, "num_layers": 1, "num_hidden_layers": 2},
        **{"head_dim": 8, "zero_expert_num": 1, "moe_topk": 2},
    },
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "minimax": {"head_dim": 32},
    "minimax_m2": {},
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64},
    "rwkv": {"attention_hidden_size": 64},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {"ffn_dim": 96},
    "youtu": {"num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "layer_types": ["mamba", "hybrid"]},
}


def config_of(family: str, **changes: Any) -> Any:
    """The config of a tiny model; fields that the family does not have are left out."""
    cls = CONFIG_MAPPING[family]
    known, names = set(inspect.signature(cls.__init__).parameters) | set(dir(cls)), getattr(cls, "attribute_map", {})
    known |= set(getattr(cls, "__dataclass_fields__", {}))
    known -= {name for name in known if isinstance(getattr(cls, name, None), property)}
    shape = {names.get(name, name): value for name, value in _SHAPE.items() if names.get(name, name) in known}
    return cls(**{**shape, **FAMILIES[family], **changes})


def build(family: str, **changes: Any) -> transformers.PreTrainedModel:
    """The model in float32, for inference; biases and gains are not all 0 and 1."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **changes)).float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save(family: str, folder: Path, **changes: Any) -> Path:
    """A model folder with the embedded model's tokenizer, as the commands take it."""
    build(family, **changes).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_folder() / name, folder)
    return folder
