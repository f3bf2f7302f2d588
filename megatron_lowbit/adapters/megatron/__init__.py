"""Megatron-Core: apply_to_megatron patches a GPTModel; the specs build one with low-bit layers from the start.

Megatron-LM finds a spec by this module and its name: --spec megatron_lowbit.adapters.megatron llama_lowbit_spec
"""

from megatron_lowbit.adapters.megatron.apply import apply_to_megatron, fingerprint
from megatron_lowbit.adapters.megatron.layout import find_linears, layout_of, model_chunks, split_rows
from megatron_lowbit.adapters.megatron.spec import (
    artifact_spec,
    block_spec,
    llama_lowbit_block_spec,
    llama_lowbit_spec,
    llama_spec,
    llama_w4a4_block_spec,
    llama_w4a4_spec,
    llama_w4a16_block_spec,
    llama_w4a16_spec,
    lowbit_spec,
    mixtral_lowbit_block_spec,
    mixtral_lowbit_spec,
    qwen3_lowbit_block_spec,
    qwen3_lowbit_spec,
    qwen3_moe_lowbit_block_spec,
    qwen3_moe_lowbit_spec,
)
from megatron_lowbit.adapters.megatron.versions import core_version

__all__ = [
    "apply_to_megatron",
    "artifact_spec",
    "block_spec",
    "core_version",
    "find_linears",
    "fingerprint",
    "layout_of",
    "llama_lowbit_block_spec",
    "llama_lowbit_spec",
    "llama_spec",
    "llama_w4a4_block_spec",
    "llama_w4a4_spec",
    "llama_w4a16_block_spec",
    "llama_w4a16_spec",
    "lowbit_spec",
    "mixtral_lowbit_block_spec",
    "mixtral_lowbit_spec",
    "model_chunks",
    "qwen3_lowbit_block_spec",
    "qwen3_lowbit_spec",
    "qwen3_moe_lowbit_block_spec",
    "qwen3_moe_lowbit_spec",
    "split_rows",
]
