"""Run large language models in few bits under tensor parallelism: quantized linears, and collectives that send Int4.

The commands are functions too; what they return is a table, and holds the figures and folders:

    import megatron_lowbit as lowbit

    lowbit.quantize("model/", data="text.txt", scheme="W4A8", output_dir="artifact/")
    lowbit.evaluate("model/", data="held_out.txt", artifact="artifact/")
    lowbit.generate("Once upon a time", artifact="artifact/")

An artifact is a folder that `calibrate` and `quantize` write. Applied to a model, it
replaces the linears by quantized ones (LowBitCheckpoint), and the all-reduce after row-parallel linears by messages of
few bits (CommPlan):

    model = lowbit.apply_to_huggingface(hf_model, "artifact/")   # one process, TP=1
    model = lowbit.apply_to_huggingface(hf_model, "artifact/", virtual_tp=8)   # as eight ranks would compute it
    engine = lowbit.apply_to_deepspeed(engine, "artifact/")      # after deepspeed.init_inference (AutoTP)
    model = lowbit.apply_to_megatron(gpt_model, "artifact/")     # a GPTModel of Megatron-Core, or its pipeline chunks
    lowbit.saturation(model)                                     # how many values lay beyond their calibrated ranges
    lowbit.remove(model)                                         # restores what was there

What an artifact holds can be read, and a plan used by itself:

    artifact = lowbit.Artifact.load("artifact/")
    artifact.checkpoint.scheme_name                              # "W4A8"
    site = artifact.plan(2).sites["model.layers.0.mlp.down_proj"]
    y = lowbit.HybridReducer(site, tp_group).all_reduce(x)       # x [tokens, features], bf16 or float32

Names:

    quantize, calibrate, evaluate, generate                      the commands, in this process
    StageResult                                                  what they return
    apply_to_huggingface, apply_to_deepspeed, apply_to_megatron  put an artifact into a model, in place
    remove                                                       take it out again
    Artifact                                                     a folder: .checkpoint and .plans by number of ranks
    LowBitCheckpoint                                             packed weights of a model, unsharded
    CommPlan                                                     what N ranks send at every site
    CalibrationStats                                             the ranges that plans are made from
    HybridReducer                                                the low-bit all-reduce of one site
    VirtualReducer                                               the same for ranks inside one process
    LowBitError                                                  bad input: one line with the value and the fix

Every name has a docstring: `help(megatron_lowbit.apply_to_huggingface)`. Names are imported when they are first used,
so that `import megatron_lowbit` stays light.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_lowbit.adapters.deepspeed import apply_to_deepspeed
    from megatron_lowbit.adapters.huggingface.apply import apply_to_huggingface
    from megatron_lowbit.adapters.megatron.apply import apply_to_megatron
    from megatron_lowbit.adapters.patching import remove, saturation
    from megatron_lowbit.artifact import Artifact
    from megatron_lowbit.comm.plan import CalibrationStats, CommPlan
    from megatron_lowbit.comm.reducers import HybridReducer
    from megatron_lowbit.comm.virtual import VirtualReducer
    from megatron_lowbit.config import LowBitError
    from megatron_lowbit.launch.api import StageResult, calibrate, evaluate, generate, quantize
    from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "artifact",
    "CalibrationStats": "comm.plan",
    "CommPlan": "comm.plan",
    "HybridReducer": "comm.reducers",
    "LowBitCheckpoint": "quant.checkpoint",
    "LowBitError": "config",
    "StageResult": "launch.api",
    "VirtualReducer": "comm.virtual",
    "apply_to_deepspeed": "adapters.deepspeed",
    "apply_to_huggingface": "adapters.huggingface.apply",
    "apply_to_megatron": "adapters.megatron.apply",
    "calibrate": "launch.api",
    "evaluate": "launch.api",
    "generate": "launch.api",
    "quantize": "launch.api",
    "remove": "adapters.patching",
    "saturation": "adapters.patching",
}
_NEEDS = {"apply_to_megatron": "megatron.core"}  # its module subclasses Megatron's layers
__all__ = [
    "Artifact",
    "CalibrationStats",
    "CommPlan",
    "HybridReducer",
    "LowBitCheckpoint",
    "LowBitError",
    "StageResult",
    "VirtualReducer",
    "apply_to_deepspeed",
    "apply_to_huggingface",
    "apply_to_megatron",
    "calibrate",
    "evaluate",
    "generate",
    "quantize",
    "remove",
    "saturation",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"megatron_lowbit.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, without those whose package is not there: help() imports all that this lists."""
    missing = {name for name, package in _NEEDS.items() if not _is_there(package)}
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__} - missing)


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # the package around it is missing
        return False
