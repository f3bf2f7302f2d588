"""What Megatron-LM's own scripts read and write: their checkpoint folders, and the arguments that describe a model.

    <folder>/latest_checkpointed_iteration.txt      the word `release`, or the number of an iteration
    <folder>/release/ or iter_0000123/              a torch_dist checkpoint; its common.pt holds `args`
    <folder>/megatron_arguments.txt                 ours: the same arguments as options, for $(cat ...)

A script takes the model's shape from options, or with --use-checkpoint-args from `args`, which some versions read in
part only (norm_epsilon and qk_layernorm are left out); the options hold for all of them.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.adapters.megatron.layout import is_hybrid
from megatron_lowbit.config import LowBitError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
OPTIONS = "megatron_arguments.txt"
SPECS = "megatron_lowbit.adapters.megatron"  # the module that --spec names
CHECKPOINT_VERSION = 3.0  # as Megatron-LM writes it: the order of the rows of linear_qkv


def script_arguments() -> Namespace | None:
    """Return the arguments of the Megatron-LM script that this process runs; None: it runs none."""
    return getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)


def trains(args: Namespace) -> bool:
    """Tell whether a script was told for how long to train."""
    asked = getattr(args, "train_iters", None) or getattr(args, "train_samples", None)
    return bool(asked) and not getattr(args, "skip_train", False)


def loaded_folder(args: Namespace) -> Path | None:
    """Return the folder of the checkpoint that a script is going to load; None: it begins without one."""
    for name in (getattr(args, "load", None), getattr(args, "pretrained_checkpoint", None)):
        if name is not None and (Path(name) / TRACKER).is_file():
            return checkpoint_folder(name, getattr(args, "ckpt_step", None))
    return None


def checkpoint_folder(folder: str | Path, iteration: int | None = None) -> Path:
    """Return the folder of one checkpoint inside what --save wrote: of that iteration, else of the latest.

    Raises LowBitError where the folder names none.
    """
    tracker = Path(folder) / TRACKER
    if not tracker.is_file():
        raise LowBitError(f"{str(folder)!r} holds no {TRACKER}; name the folder that --save or convert wrote")
    word = str(iteration) if iteration else tracker.read_text(encoding="utf-8").strip()
    if word != RELEASE and not word.isdecimal():
        raise LowBitError(f"{str(tracker)!r} holds {word[:40]!r}, no iteration; save the checkpoint again")
    return Path(folder) / (RELEASE if word == RELEASE else f"iter_{int(word):07d}")


def model_arguments(model: Any, tokenizer: str | None = None) -> dict[str, Any]:
    """Return what a script has to be told so that it builds this model, under the names of its arguments.

    A HybridModel does not keep what its rotary embedding was built from: that is not among them. tokenizer: a folder
    or hub id of Hugging Face's.
    """
    config = model.config
    groups = config.num_query_groups or config.num_attention_heads
    arguments: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": groups != config.num_attention_heads,
        "num_query_groups": groups,
        "kv_channels": config.kv_channels,
        "seq_length": model.max_sequence_length,
        "max_position_embeddings": model.max_sequence_length,
        "position_embedding_type": model.position_embedding_type,
        "swiglu": config.gated_linear_unit,
        "normalization": config.normalization,
        "norm_epsilon": config.layernorm_epsilon,
        "disable_bias_linear": not config.add_bias_linear,
        "add_qkv_bias": config.add_qkv_bias,
        "qk_layernorm": config.qk_layernorm,
        "untie_embeddings_and_output_weights": not model.share_embeddings_and_output_weights,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.hidden_dropout,
        "attention_softmax_in_fp32": config.attention_softmax_in_fp32,
        "make_vocab_size_divisible_by": _power_of_two_in(model.vocab_size),
    }
    if config.num_moe_experts is not None:
        arguments |= {
            "num_experts": config.num_moe_experts,
            "moe_layer_freq": config.moe_layer_freq,
            "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
            "moe_router_topk": config.moe_router_topk,
            "moe_router_pre_softmax": config.moe_router_pre_softmax,
            "moe_grouped_gemm": config.moe_grouped_gemm,
        }
        if config.moe_shared_expert_intermediate_size is not None:
            arguments["moe_shared_expert_intermediate_size"] = config.moe_shared_expert_intermediate_size
            arguments["moe_shared_expert_gate"] = config.moe_shared_expert_gate
    if is_hybrid(model):
        name = next(name for name in ("hybrid_layer_pattern", "hybrid_override_pattern") if hasattr(model, name))
        arguments[name] = getattr(model, name)
    else:
        arguments["rotary_base"] = int(model.rotary_base)
        arguments["rotary_percent"] = float(model.rotary_percent)
        arguments["use_rope_scaling"] = bool(model.rotary_scaling)
    if tokenizer is not None:
        arguments |= {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizer}
    return arguments


def check_rotary(hf_config: Any) -> None:
    """Raise LowBitError for a rotary embedding that the scripts' GPTModels do not have.

    They take --use-rope-scaling, but leave --rope-scaling-factor at 8, and --rotary-seq-len-interpolation-factor out.
    """
    rope = dict(getattr(hf_config, "rope_parameters", None) or {})
    kind, base = rope.get("rope_type", "default"), rope.get("rope_theta", 10000.0)
    if kind not in ("default", "llama3") or (kind == "llama3" and rope.get("factor") != 8) or base != int(base):
        values = ", ".join(f"{key}={rope[key]}" for key in ("rope_type", "factor", "rope_theta") if key in rope)
        raise LowBitError(
            f"the rotary embedding ({values}) is none that Megatron-LM's scripts build (plain, or llama3 with factor 8 "
            "and a whole rope_theta); run this model with engine=megatron"
        )


def _power_of_two_in(vocab: int) -> int:
    """Return the largest power of two, up to Megatron's 128, that divides a vocabulary: none of it is padded then."""
    return min(128, vocab & -vocab)


def as_options(arguments: dict[str, Any], spec: str | None) -> str:
    """Return arguments as options, one a line; spec: the name of one of our specs."""
    lines = [] if spec is None else [f"--spec {SPECS} {spec}"]
    for name, value in arguments.items():
        if isinstance(value, bool):
            lines += [f"--{name.replace('_', '-')}"] if value else []
        elif isinstance(value, list):  # as Megatron-LM writes one, and the shell takes it for no pattern of file names
            lines.append(f"--{name.replace('_', '-')} ({value})".replace(", ", ","))
        elif name != "num_query_groups" or arguments["group_query_attention"]:
            lines.append(f"--{name.replace('_', '-')} {value}")
    return "\n".join(lines) + "\n"


def as_namespace(arguments: dict[str, Any], spec: str | None, model: Any) -> Namespace:
    """Return arguments as the `args` of a checkpoint, with what a script derives from them."""
    config = model.config
    derived = {
        "add_bias_linear": config.add_bias_linear,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_interleaved": config.rotary_interleaved,
        "squared_relu": False,
        "apply_layernorm_1p": config.layernorm_zero_centered_gamma,
        "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
        "padded_vocab_size": model.vocab_size,
        "ckpt_format": "torch_dist",
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "params_dtype": config.params_dtype,
        "bf16": config.params_dtype == torch.bfloat16,
        "fp16": config.params_dtype == torch.float16,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    named = {} if spec is None else {"spec": [SPECS, spec]}
    return Namespace(**arguments, **derived, **named)
