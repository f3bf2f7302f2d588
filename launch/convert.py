"""megatron-lowbit convert: a Hugging Face folder or an artifact to a checkpoint of Megatron-LM's scripts, and back.

    model= and/or artifact=     -> <output_dir>/megatron      a torch_dist checkpoint for --load, at any TP and PP
    checkpoint=, full precision -> <output_dir>/huggingface   the model in full precision
    checkpoint=, packed weights -> <output_dir>/artifact      the artifact that it was made from

A checkpoint holds the same tensors at every tp and pp; more ranks only share the memory. Config and tokenizer lie
beside what is written, so that a checkpoint of ours needs no model= on the way back.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import ConvertConfig, LowBitError
from megatron_lowbit.io.files import writing
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.generation import copy_generation_config
from megatron_lowbit.launch.inputs import model_name
from megatron_lowbit.launch.loading import compute_dtype, read_config, read_tokenizer, source_of
from megatron_lowbit.launch.runner import run_stage
from megatron_lowbit.runtime.distributed import on_rank_zero
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger
from megatron_lowbit.runtime.rendezvous import join
from megatron_lowbit.runtime.say import say
from megatron_lowbit.temporary import beside, remove, remove_dead

CONFIG = ConvertConfig


def run(config: ConvertConfig, logger: MetricLogger) -> dict[str, Any]:
    row = to_megatron(config) if config.checkpoint is None else from_megatron(config, config.checkpoint)
    if env_rank() == 0:
        say(f"wrote {row['folder']}: {row['holds']}")
    return {"rows": [row]}


def to_megatron(config: ConvertConfig) -> dict[str, Any]:
    """Write <output_dir>/megatron; returns the row of the results."""
    from megatron_lowbit.adapters.megatron import scripts
    from megatron_lowbit.adapters.megatron.checkpoint import save_checkpoint

    target = new_folder(config, "megatron")
    artifact = None if config.artifact is None else Artifact.load(config.artifact)
    source = source_of(config, None if artifact is None else artifact.checkpoint)
    hf_config = read_config(source)
    text_config = getattr(hf_config, "text_config", None) or hf_config
    scripts.check_rotary(text_config)
    engine = start_engine(as_stored(config, hf_config))
    if artifact is not None:
        engine.apply(artifact)
    spec = None if artifact is None else ready_spec(engine.model.config)
    save_checkpoint(engine.model, target, spec, lambda folder: describe(engine, source, folder))
    holds = "full precision" if artifact is None else f"{source}, low-bit"
    return {"name": "megatron", "folder": str(target), "holds": holds, "spec": spec}


def ready_spec(config: Any) -> str:
    """Return the name of the ready spec that builds a low-bit model of a TransformerConfig."""
    dense, mixture = ("qwen3", "qwen3_moe") if config.qk_layernorm else ("llama", "mixtral")
    return f"{dense if config.num_moe_experts is None else mixture}_lowbit_block_spec"


def as_stored(config: ConvertConfig, hf_config: Any) -> ConvertConfig:
    """Return the config with the dtype in which the model's weights are stored, where none is given.

    What neither bfloat16 nor float32 holds as it is becomes float32.
    """
    if config.dtype != "auto":
        return config
    stored = getattr(hf_config, "dtype", None)
    return config.model_copy(update={"dtype": "bfloat16" if stored == torch.bfloat16 else "float32"})


def describe(engine: Any, source: str, folder: Path) -> None:
    """Put config, generation config and tokenizer into a folder."""
    engine.hf_config.dtype = next(engine.module.parameters()).dtype  # skeletons of it had others
    engine.hf_config.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)
    copy_generation_config(source, folder)


def from_megatron(config: ConvertConfig, checkpoint: str) -> dict[str, Any]:
    """Write <output_dir>/huggingface, or <output_dir>/artifact; returns the row of the results."""
    from megatron_lowbit.adapters.megatron import model as megatron_model
    from megatron_lowbit.adapters.megatron.checkpoint import load_checkpoint, stored_description, stored_kind
    from megatron_lowbit.adapters.megatron.scripts import checkpoint_folder
    from megatron_lowbit.adapters.megatron.stored_artifact import to_artifact
    from megatron_lowbit.adapters.patching import remove as remove_artifact

    stored, source = checkpoint_folder(checkpoint), model_name(config.model or checkpoint)
    hf_config, tokenizer = read_config(source), read_tokenizer(source)
    join()
    megatron_model.initialize(config.tp, config.pp, config.seed % 2**31)
    about = stored_description(stored)
    if stored_kind(stored) == "packed weights" and about is None:
        raise LowBitError(
            f"{checkpoint!r} holds packed weights without the description of their artifact, as scripts save them; "
            "use the artifact that it was converted from"
        )
    name = "huggingface" if about is None else "artifact"
    target, text_config = new_folder(config, name), getattr(hf_config, "text_config", None) or hf_config
    if about is not None and about["rotation"] is not None and about["rotation"]["residual"]:
        text_config.tie_word_embeddings = False  # a rotated embedding is no longer the output projection
    model = megatron_model.build(text_config, compute_dtype(as_stored(config, hf_config)))
    load_checkpoint(model, stored)
    whole: Any
    if about is None:
        whole = megatron_model.to_huggingface(remove_artifact(model), text_config)
    else:
        whole = to_artifact(model, about, text_config)

    def save(folder: Path) -> None:
        assert whole is not None, "rank 0 has the whole model"
        tokenizer.save_pretrained(folder)
        copy_generation_config(source, folder)
        if about is not None:
            hf_config.dtype = next(model.parameters()).dtype  # skeletons of it had others
            hf_config.save_pretrained(folder)
            for part in (*whole.plans.values(), whole.checkpoint):
                part.save(folder)
        else:
            whole.save_pretrained(folder)

    write_folder(target, save)
    holds = "full precision" if about is None else "low-bit"
    return {"name": name, "folder": str(target), "holds": holds, "spec": None}


def new_folder(config: ConvertConfig, name: str) -> Path:
    """Return a folder of output_dir that is not there yet. Raises LowBitError where it is."""
    folder = Path(config.output_dir) / name

    def check() -> None:
        if folder.exists():
            raise LowBitError(f"{str(folder)!r} exists; choose another output_dir, or delete it")

    on_rank_zero(check)
    return folder


def write_folder(target: Path, save: Callable[[Path], None]) -> None:
    """Have rank 0 write a folder, which is there when it is whole, or not at all."""

    def write() -> None:
        remove_dead([target.parent], prefix=f".{target.name}.")
        partial = beside(target)
        try:
            with writing(target):
                partial.mkdir(parents=True)
                save(partial)
                os.replace(partial, target)
        finally:
            remove(partial)

    on_rank_zero(write)


if __name__ == "__main__":
    sys.exit(run_stage("convert", sys.argv[1:]))
