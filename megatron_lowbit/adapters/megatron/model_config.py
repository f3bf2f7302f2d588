"""What Megatron is told of a Hugging Face decoder: its TransformerConfig, and GPTModel's arguments.

Supported are the Llama-like ones: llama, mistral, qwen2, qwen3, phi3; and with experts mixtral, qwen2_moe, qwen3_moe.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.megatron import experts
from megatron_lowbit.config import LowBitError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", *experts.MODEL_TYPES)


def transformer_config(
    hf_config: Any, dtype: torch.dtype = torch.float32, sequence_parallel: bool = False
) -> TransformerConfig:
    """Return the TransformerConfig of a Hugging Face text config, for the parallel sizes that Megatron has been
    initialized with.

    Raises LowBitError for a model type, activation or rotary embedding that Megatron's GPTModel would compute
    otherwise.
    """
    if hf_config.model_type not in MODEL_TYPES:
        raise LowBitError(
            f"model_type {hf_config.model_type!r} is not supported with engine=megatron "
            f"({', '.join(MODEL_TYPES)} are); use engine=huggingface or deepspeed"
        )
    if hf_config.hidden_act != "silu":
        raise LowBitError(f"hidden_act={hf_config.hidden_act!r} is not supported with engine=megatron; it needs silu")
    tp, pp = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    huggingface.check_divides(hf_config, tp, "tp", share_kv_heads=True)
    if hf_config.num_hidden_layers % pp:
        raise LowBitError(f"pp={pp} does not divide the model's num_hidden_layers={hf_config.num_hidden_layers}")
    gpu = torch.cuda.is_available()
    config = TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=head_dim(hf_config),
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=_has_bias(hf_config, "output"),
        add_qkv_bias=_has_bias(hf_config, "qkv"),
        qk_layernorm=hf_config.model_type in ("qwen3", "qwen3_moe"),
        attention_dropout=0.0,
        hidden_dropout=0.0,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=gpu,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=sequence_parallel and tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not gpu,
        perform_initialization=False,  # every parameter is loaded
        **experts.config_arguments(hf_config),
    )
    for name, value in yarn(hf_config).items():  # no fields of the class: GPTModel and its attention look for them
        setattr(config, f"yarn_{name}", value)
    return config


def head_dim(hf_config: Any) -> int:
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def _has_bias(hf_config: Any, where: str) -> bool:
    """Return whether the q, k, v projections ("qkv"), or the output and MLP projections ("output") have biases."""
    attention = bool(getattr(hf_config, "attention_bias", False))
    if where == "qkv":
        return attention or hf_config.model_type == "qwen2" or bool(getattr(hf_config, "qkv_bias", False))
    return attention or bool(getattr(hf_config, "mlp_bias", False))


def expects_bias(hf_config: Any, role: str) -> bool:
    """Return whether the Hugging Face model has a bias there; Megatron's, which has all of them or none, may have
    zeros."""
    if role == "linear_qkv":
        return _has_bias(hf_config, "qkv")
    return bool(getattr(hf_config, "attention_bias" if role == "linear_proj" else "mlp_bias", False))


def context_length(hf_config: Any) -> int:
    """Return how many tokens the model sees: at most a sliding window, within which windowed attention is full
    attention."""
    context = getattr(hf_config, "max_position_embeddings", None) or 2048
    window = getattr(hf_config, "sliding_window", None)
    return min(context, window) if window and getattr(hf_config, "use_sliding_window", True) else context


def yarn(hf_config: Any) -> dict[str, Any]:
    """Return what a TransformerConfig is told of the YaRN scaling of a Hugging Face config, so that it is that of
    transformers; nothing where there is none. Raises LowBitError for one that turns only a part of each head."""
    rope = dict(getattr(hf_config, "rope_parameters", None) or {})
    if rope.get("rope_type") != "yarn":
        return {}
    if (part := rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise LowBitError(
            f"rope_type 'yarn' with partial_rotary_factor={part} is not supported with engine=megatron; "
            "use engine=huggingface or deepspeed"
        )
    original = rope.get("original_max_position_embeddings") or hf_config.max_position_embeddings
    scale = rope.get("factor") or hf_config.max_position_embeddings / original
    grows, over_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if not (grows and over_all):
        grows, over_all = 1.0, 0.0  # 1 + 0.1 ln(scale)
    if rope.get("attention_factor") is not None and scale > 1:
        grows, over_all = (rope["attention_factor"] - 1) / (0.1 * math.log(scale)), 0.0
    return {
        "rotary_scaling_factor": scale,
        "original_max_position_embeddings": original,
        "beta_fast": rope.get("beta_fast") or 32.0,
        "beta_slow": rope.get("beta_slow") or 1.0,
        "mscale": grows,
        "mscale_all_dim": over_all,
        "correction_range_round_to_int": rope.get("truncate", True),
    }


def rotary(hf_config: Any) -> dict[str, Any]:
    """Return GPTModel's arguments for the rotary embedding. Of YaRN it finds the rest in its TransformerConfig."""
    rope = dict(getattr(hf_config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    arguments: dict[str, Any] = {
        "position_embedding_type": "yarn" if kind == "yarn" else "rope",
        "rotary_base": rope.get("rope_theta", 10000.0),
        "rotary_percent": rope.get("partial_rotary_factor") or getattr(hf_config, "partial_rotary_factor", None) or 1.0,
    }
    if kind == "linear":
        arguments["seq_len_interpolation_factor"] = rope["factor"]
    elif kind == "llama3":
        fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        differing = [key for key, value in fixed.items() if rope.get(key) != value]
        if differing:
            raise LowBitError(
                f"rope {differing[0]}={rope.get(differing[0])} differs from Megatron's {fixed[differing[0]]}; "
                "use engine=huggingface or deepspeed"
            )
        arguments |= {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    elif kind not in ("default", "yarn"):
        raise LowBitError(
            f"rope_type {kind!r} is not supported with engine=megatron; use engine=huggingface or deepspeed"
        )
    return arguments
