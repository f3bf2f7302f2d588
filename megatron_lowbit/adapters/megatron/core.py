"""Megatron-Core, or one sentence that names the extra: imported before what needs it."""

from megatron_lowbit.runtime.metrics import require

DISTRIBUTION = "megatron-core"

require("megatron.core", "megatron")
