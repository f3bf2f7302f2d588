"""Megatron-Core, or one sentence that names the extra: imported before what needs it."""

from megatron_lowbit.runtime.metrics import require

require("megatron.core", "megatron")
