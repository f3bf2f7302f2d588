"""Hugging Face models: find their linears, quantize them, their norms and their attention, in one process."""

from megatron_lowbit.adapters.huggingface.apply import apply_to_huggingface

__all__ = ["apply_to_huggingface"]
