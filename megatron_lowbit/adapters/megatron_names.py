"""What the linears of a decoder layer are called in Megatron-Core, and in Hugging Face models. Needs no Megatron."""

from __future__ import annotations

from typing import Literal

Role = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "shared_fc1", "shared_fc2"]

PATHS: dict[Role, str] = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
    "shared_fc1": "mlp.shared_experts.linear_fc1",
    "shared_fc2": "mlp.shared_experts.linear_fc2",
}
SHARED = "mlp.shared_expert."  # Qwen2-MoE's name of the expert that sees every token
SHARED_ELSEWHERE = "mlp.shared_experts."  # DeepSeek's, dots.llm1's
# The linears of Hugging Face that make up a role: one by one, or fused there too (Phi-3).
PARTS: dict[Role, tuple[tuple[str, ...], str]] = {
    "linear_qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.qkv_proj"),
    "linear_proj": (("self_attn.o_proj",), "self_attn.o_proj"),
    "linear_fc1": (("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up_proj"),
    "linear_fc2": (("mlp.down_proj",), "mlp.down_proj"),
    "shared_fc1": ((f"{SHARED}gate_proj", f"{SHARED}up_proj"), f"{SHARED}gate_up_proj"),
    "shared_fc2": ((f"{SHARED}down_proj",), f"{SHARED}down_proj"),
}
