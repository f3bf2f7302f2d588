"""Megatron-Core: apply_to_megatron patches a GPTModel; the specs build one with low-bit layers from the start.

Megatron-LM finds a spec by this module and its name: --spec megatron_lowbit.adapters.megatron llama_lowbit_spec
"""

from megatron_lowbit.adapters.megatron.apply import *
