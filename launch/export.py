"""megatron-lowbit export: an artifact as a model folder that other programs load.

format=huggingface          full-precision weights that stand for the codes; stock transformers loads them
format=compressed-tensors   codes, for transformers (with the compressed-tensors package) and vLLM
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_lowbit.adapters import compressed_tensors
from megatron_lowbit.adapters.huggingface.merge import merge
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import ExportConfig, LowBitError
from megatron_lowbit.io.files import writing
from megatron_lowbit.launch.generation import copy_generation_config
from megatron_lowbit.launch.loading import load_model, read_config, read_tokenizer
from megatron_lowbit.launch.runner import run_stage
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.runtime.metrics import MetricLogger, progress
from megatron_lowbit.runtime.say import say
from megatron_lowbit.temporary import beside, remove

CONFIG = ExportConfig

DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def run(config: ExportConfig, logger: MetricLogger) -> dict[str, Any]:
    return {"rows": [export(config)]}


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the folder; returns its row of the results."""
    if config.artifact is None:
        raise LowBitError("artifact is not set; name a folder that quantize has written")
    folder, output = Path(config.artifact), Path(config.output_dir)
    if folder.resolve() == output.resolve():
        raise LowBitError("output_dir is the artifact's own folder; name another")
    checkpoint = Artifact.load(folder).checkpoint
    if checkpoint is None:
        raise LowBitError(
            f"artifact {config.artifact!r} holds no quantized weights; name one that quantize has written"
        )
    hf_config = read_config(folder)
    dtype = DTYPES[config.dtype]
    tokenizer = read_tokenizer(folder)
    write: Callable[[Path], Any]
    if config.format == "huggingface":
        write = _merged(config, hf_config, checkpoint, dtype).save_pretrained
    else:
        write = _compressed(config, hf_config, checkpoint, dtype)
    written = _in_place(output, write, tokenizer, folder)
    size = sum(file.stat().st_size for file in written)
    say(f"wrote {config.format} in {', '.join(sorted(file.name for file in written))}: {size:,} bytes in {output}")
    linears = len(checkpoint.linears)
    return {"name": config.format, "scheme": checkpoint.scheme_name, "linears": linears, "bytes": size}


def _merged(config: ExportConfig, hf_config: Any, checkpoint: LowBitCheckpoint, dtype: torch.dtype) -> Any:
    """Return the model of plain weights."""
    model = _model(config, hf_config, checkpoint, dtype)
    merge(model, checkpoint, dtype)
    model.config.dtype = dtype
    return model


def _compressed(
    config: ExportConfig, hf_config: Any, checkpoint: LowBitCheckpoint, dtype: torch.dtype
) -> Callable[[Path], None]:
    """Return what writes the codes, and the config with its quantization_config, into a folder."""
    form = compressed_tensors.check_exports(checkpoint)
    model = _model(config, hf_config, checkpoint, dtype)
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in checkpoint.tensors.items()}
    packed = progress(checkpoint.linears.items(), len(checkpoint.linears), "packing codes")
    for name, weight in packed:
        tensors |= compressed_tensors.export_linear(name, weight, form == compressed_tensors.PACKED)
    described = compressed_tensors.describe(model, checkpoint, form)

    def write(folder: Path) -> None:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        model.config.dtype = dtype
        model.config.quantization_config = described
        model.config.save_pretrained(folder)

    return write


def _model(config: ExportConfig, hf_config: Any, checkpoint: LowBitCheckpoint, dtype: torch.dtype) -> Any:
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return load_model(config.model_copy(update={"model": None, "dtype": name}), hf_config, checkpoint)


def _in_place(output: Path, write: Callable[[Path], None], tokenizer: Any, artifact: Path) -> list[Path]:
    """Write a model folder under a temporary name, then rename its files into `output`, config.json last: a folder
    loads once that is there."""
    scratch = beside(output / "export")
    try:
        with writing(output):
            scratch.mkdir(parents=True)
            write(scratch)
            tokenizer.save_pretrained(scratch)
            copy_generation_config(artifact, scratch)
            (output / "config.json").unlink(missing_ok=True)
            for old in output.glob("model*.safetensors*"):
                old.unlink()
            files = sorted(scratch.iterdir(), key=lambda file: file.name == "config.json")
            for file in files:
                os.replace(file, output / file.name)
            return [output / file.name for file in files]
    finally:
        remove(scratch)


if __name__ == "__main__":
    sys.exit(run_stage("export", sys.argv[1:]))
