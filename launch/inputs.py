"""Whether what a config names is there: packages, the model, the artifact, text, prompts. Needs no torch.

Files are looked for in a single process only: of the ranks of a launched job, rank 0 alone reads text, prompts and
tables, and the others may be on machines that do not have them. os.path says of a name that no system takes (too long,
with a NUL) that nothing is there, where pathlib raises.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_lowbit.config import LOCAL_TASK, LowBitError, QuantizeConfig, StageConfig, one_line, shown
from megatron_lowbit.config.errors import nearest
from megatron_lowbit.io.gptq_text import PREFIX, parse_source
from megatron_lowbit.io.hub import check_on_hub
from megatron_lowbit.io.texts import check_source
from megatron_lowbit.runtime.launcher_env import launched

# By the extra that installs them.
PACKAGES = {
    "deepspeed": "deepspeed",
    "eval": "lm_eval",
    "megatron": "megatron.core",
    "serve": "uvicorn",
    "wandb": "wandb",
}
NEED_A_MODEL = ("calibrate", "convert", "evaluate", "generate", "quantize", "serve")


def check_inputs(name: str, config: StageConfig) -> None:
    """Raise LowBitError for a package, model, artifact, text or file that a stage's config names and is not there."""
    for engine in getattr(config, "engines", (config.engine,)):
        if engine in PACKAGES and not (isinstance(config, QuantizeConfig) and config.dry_run):
            check_package(engine)
    if config.wandb != "off":
        check_package("wandb")
    if name == "serve":
        check_package("serve")
    tasks = getattr(getattr(config, "evaluation", None), "tasks", ())
    if tasks:
        check_package("eval")
    if name == "parity":
        for key in ("model", "artifact", "prompts"):
            if getattr(config, key) is None:
                raise LowBitError(f"{key} is not set; parity compares an artifact with its model on a file of prompts")
    weights, calibration = getattr(config, "weights", None), getattr(config, "calibration", None)
    if weights is not None and weights.chooses_bits and not getattr(config, "dry_run", False):
        if name != "quantize" and config.artifact is None:
            raise LowBitError(
                f"weights.scheme={weights.scheme} chooses bits on text: make an artifact with quantize, and pass it"
            )
        if name == "quantize" and config.engine != "huggingface":
            raise LowBitError(
                f"weights.scheme={weights.scheme} chooses bits on the whole model, which engine={config.engine} "
                "splits: leave engine out; every engine runs the artifact"
            )
        if name == "quantize" and (calibration is None or calibration.data is None):
            raise LowBitError(
                f"weights.scheme={weights.scheme} chooses bits on text; set calibration.data, or a scheme of equal bits"
            )
    if launched():
        return
    ask_hub = not getattr(config, "dry_run", False)  # which reads no text, and no model whose shape is in the config
    checkpoint = getattr(config, "checkpoint", None)
    if checkpoint is not None and not os.path.isfile(os.path.join(checkpoint, "latest_checkpointed_iteration.txt")):
        raise LowBitError(
            f"checkpoint={shown(checkpoint)} holds no latest_checkpointed_iteration.txt; name the folder that --save "
            "of a Megatron-LM script, or convert, wrote"
        )
    if config.model is not None:
        name_or_folder = model_name(config.model)
        if ask_hub:
            check_on_hub(name_or_folder, "model", "model")
    elif checkpoint is not None:
        if not os.path.isfile(os.path.join(checkpoint, "config.json")):
            raise LowBitError(f"{shown(checkpoint)} holds no config.json: give its Hugging Face folder as model=...")
    elif config.artifact is None and name in NEED_A_MODEL and not getattr(config, "architecture", None):
        raise LowBitError("model is not set; name a folder, a hub id or `embedded`")
    if config.artifact is not None:
        artifact_folder(config.artifact)
    for key in ("calibration", "evaluation"):
        section = getattr(config, key, None)
        if section is not None and section.data is not None:
            if section.data.startswith(PREFIX):
                parse_source(section.data, key)
            else:
                check_source(section.data, key, ask_hub=ask_hub)
        elif section is not None and key == {"calibrate": "calibration", "evaluate": "evaluation"}.get(name):
            raise LowBitError(no_data(key))
    if tasks:
        check_tasks(tasks, config.evaluation.task_data)  # type: ignore[attr-defined]
    prompts = getattr(config, "prompts", None)
    if prompts is not None and (os.path.isfile(prompts) or not os.path.exists(prompts)):
        read_prompts(prompts)  # not a pipe, which can be read once


def check_package(extra: str) -> None:
    """Raise LowBitError, with the pip command that installs it, where an optional package is not there."""
    module = PACKAGES[extra]
    try:
        spec = None if module in sys.modules and sys.modules[module] is None else find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:  # a folder of that name on the path is found as an empty package
        raise LowBitError(f"{module.replace('.', '-')} is not installed; pip install 'megatron-lowbit[{extra}]'")


def check_tasks(tasks: Sequence[str], task_data: str | None) -> None:
    """Raise LowBitError where local tasks have no folder to read."""
    local = next((task for task in tasks if task.startswith(LOCAL_TASK)), None)
    if local is not None and task_data is None:
        raise LowBitError(f"evaluation.tasks: {shown(local)} reads files; name their folder as evaluation.task_data")
    if task_data is not None and not os.path.isdir(task_data):
        raise LowBitError(f"evaluation.task_data: folder {shown(task_data)} does not exist")


def no_data(key: str) -> str:
    """Return what to say where a section has no text."""
    known = key.replace("evaluation", "validation")
    return f"{key}.data is not set; name a text file, a hub dataset or stdlib:{known}"


def model_name(name: str) -> str:
    """Return the folder or hub id that `model` names. Raises LowBitError for a folder that is not there or holds no
    model."""
    if name == "embedded":
        from megatron_lowbit import embedded

        return str(Path(embedded.__file__).parent)
    path = Path(name)
    if not os.path.isdir(name) and nearest(name, ["embedded"], cutoff=0.85):  # it would be looked for on the hub
        raise LowBitError(f"model={shown(name)} is not there; did you mean 'embedded'?")
    if not os.path.isdir(name) and (
        path.is_absolute() or name.startswith((".", "~")) or (name.count("/") != 1 and "/" in name)
    ):
        raise LowBitError(f"model folder {shown(name)} does not exist")
    if os.path.isdir(name) and not (path / "config.json").exists():
        raise LowBitError(f"{shown(name)} holds no config.json; it is not a Hugging Face model folder")
    return name


def artifact_folder(name: str) -> Path:
    """Return the folder that `artifact` names. Raises LowBitError where there is none."""
    if not os.path.isdir(name):
        raise LowBitError(f"artifact folder {shown(name)} does not exist; write one with calibrate or quantize")
    return Path(name)


def read_prompts(path: str) -> list[str]:
    """Return the lines of a text file that are not empty."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise LowBitError(f"cannot read prompts={shown(path)}: {one_line(error)}") from None
    if not lines:
        raise LowBitError(f"prompts={shown(path)} holds no prompts; write one per line")
    if any("\0" in line for line in lines):
        raise LowBitError(f"prompts={shown(path)} holds NUL characters; write text in UTF-8")
    return lines
