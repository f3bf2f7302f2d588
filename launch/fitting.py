"""Whether a model and an artifact fit a number of ranks, as far as config.json and the artifact's file names tell.

It is told before ranks are started, which takes seconds each. What more there is to tell, the engines tell.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from megatron_lowbit.adapters.huggingface.apply import check_divides
from megatron_lowbit.adapters.patching import choose_plan
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.plan import plan_sizes
from megatron_lowbit.config import LowBitError, StageConfig
from megatron_lowbit.io.files import read_json
from megatron_lowbit.launch.inputs import model_name

APPLYING = ("evaluate", "generate", "serve")  # they apply the artifact's plan of their own size


def check_fitting(name: str, config: StageConfig) -> None:
    """Raise LowBitError where tp or virtual_tp ranks cannot share the model, or the artifact has no plan for them."""
    size = max(config.tp, config.virtual_tp)
    source = config.model or config.artifact
    if size == 1 or source is None:
        return
    architecture = _architecture(Path(model_name(source)))
    if architecture is not None and name in (*APPLYING, "benchmark", "calibrate", "quantize"):
        key: Literal["tp", "virtual_tp"] = "virtual_tp" if config.virtual_tp > 1 else "tp"
        check_divides(architecture, size, key, share_kv_heads=config.engine == "megatron")
    mode = getattr(getattr(config, "comm", None), "mode", None)
    studies = any(getattr(config, key, None) for key in ("ablation", "comm_ablation", "token_ablation", "experiment"))
    if name in APPLYING and config.artifact is not None and not studies and (mode is None or config.model is None):
        plans: dict[int, Any] = dict.fromkeys(plan_sizes(Path(config.artifact)))
        choose_plan(Artifact(None, plans), size, mode)


def _architecture(folder: Path) -> Any:
    """Return the keys of a folder's config.json, of a model for several kinds of input those of its text; None where it
    cannot be read, which is told where the model is loaded."""
    try:
        keys = read_json(folder / "config.json", nan=True)
    except LowBitError:
        return None
    text = keys.get("text_config")
    return SimpleNamespace(**(text if isinstance(text, dict) else keys))
