"""Low-bit tensor-parallel LLM inference: quantized linears and Int4/BF16 hybrid collectives.

    import megatron_lowbit as lowbit
    engine = lowbit.apply_to_deepspeed(engine, "artifact/")      # after deepspeed.init_inference (AutoTP)
    model = lowbit.apply_to_huggingface(hf_model, "artifact/")   # one process, TP=1 or virtual TP
    model = lowbit.apply_to_megatron(gpt_model, "artifact/")     # a GPTModel of Megatron-Core, or its pipeline chunks
    lowbit.remove(model)                                         # restores what was there
    y = lowbit.HybridReducer(site_plan, tp_group).all_reduce(x)

Names are imported when they are first used, so that `import megatron_lowbit` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_lowbit.adapters.deepspeed import apply_to_deepspeed
    from megatron_lowbit.adapters.huggingface import apply_to_huggingface
    from megatron_lowbit.adapters.megatron import apply_to_megatron
    from megatron_lowbit.adapters.patching import remove
    from megatron_lowbit.artifacts import Artifact, CalibrationStats, CommPlan, LowBitCheckpoint
    from megatron_lowbit.collectives import HybridReducer, VirtualReducer
    from megatron_lowbit.config import LowBitError

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "artifacts",
    "CalibrationStats": "artifacts",
    "CommPlan": "artifacts",
    "HybridReducer": "collectives",
    "LowBitCheckpoint": "artifacts",
    "LowBitError": "config",
    "VirtualReducer": "collectives",
    "apply_to_deepspeed": "adapters.deepspeed",
    "apply_to_huggingface": "adapters.huggingface",
    "apply_to_megatron": "adapters.megatron",
    "remove": "adapters.patching",
}
__all__ = [
    "Artifact",
    "CalibrationStats",
    "CommPlan",
    "HybridReducer",
    "LowBitCheckpoint",
    "LowBitError",
    "VirtualReducer",
    "apply_to_deepspeed",
    "apply_to_huggingface",
    "apply_to_megatron",
    "remove",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"megatron_lowbit.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
