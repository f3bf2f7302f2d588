"""The folder of a model, and whether its config is of a model that can be quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lowbit.config import LowBitError, one_line, shown
from megatron_lowbit.io.hub import check_on_hub

WANTED = ("*.json", "*.safetensors", "*.model", "*.txt")
OTHER_FORMATS = ("consolidated*", "original/*")  # the same weights once more


def download(name: str) -> str:
    """Return the folder of a model: itself, or the hub's files in the local cache."""
    if Path(name).is_dir():
        return name
    check_on_hub(name, "model", "model")
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=[*WANTED], ignore_patterns=[*OTHER_FORMATS])
    except Exception as error:  # whatever the hub client raises
        raise LowBitError(f"cannot load model {name!r}: {one_line(error)}") from None


def check_config(hf_config: Any, name: str | Path) -> None:
    """Raise LowBitError for the config of another kind of model, or of one that was quantized before."""
    if not any("CausalLM" in a or "LMHead" in a for a in hf_config.architectures or ["CausalLM"]):
        raise LowBitError(f"{str(name)!r} is a {hf_config.architectures[0]}, not a causal LM")
    for config in (hf_config, getattr(hf_config, "text_config", None)):
        given = getattr(config, "quantization_config", None)
        if given:
            method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
            raise LowBitError(
                f"the config.json of {shown(name)} has a quantization_config ({method or 'of no method'}): a "
                "full-precision model is needed; where its weights are in full precision, delete that key"
            )
