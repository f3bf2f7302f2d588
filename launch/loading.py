"""Loads what a stage runs: config, tokenizer and model, from a checkpoint's folder, a hub id or an artifact alone."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface.outliers import inject_outliers
from megatron_lowbit.adapters.huggingface.skeleton import skeleton, stored_buffers
from megatron_lowbit.config import (
    LowBitError,
    StageConfig,
    one_line,
)
from megatron_lowbit.io.hf_names import ModelWeights, lacking, prefix_mapping, untie, unties
from megatron_lowbit.io.hf_weights import HFWeights, check_safetensors
from megatron_lowbit.io.hub import check_on_hub
from megatron_lowbit.launch.generation import load_generation_config
from megatron_lowbit.launch.inputs import model_name
from megatron_lowbit.launch.model_folder import check_config, download
from megatron_lowbit.launch.tokenizer import load_tokenizer
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint


def compute_dtype(config: StageConfig) -> torch.dtype:
    auto = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype, auto)


def source_of(config: StageConfig, checkpoint: LowBitCheckpoint | None) -> str:
    """Return the folder or hub id of the model's config and tokenizer: config.model or, without one, the artifact."""
    if config.model is None and (checkpoint is None or config.artifact is None):
        raise LowBitError("model is not set; name a folder, a hub id or `embedded`")
    return model_name(config.model or config.artifact or "")


def read_config(name: str | Path) -> Any:
    """Return the Hugging Face config of a causal LM's folder or hub id; LowBitError where there is none."""
    from transformers import AutoConfig

    check_on_hub(str(name), "model", "model")
    with _loading(name):
        hf_config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    check_config(hf_config, name)
    return hf_config


def read_tokenizer(name: str | Path) -> Any:
    """Return the tokenizer of a folder or hub id; LowBitError where there is none."""
    with _loading(name):
        return load_tokenizer(name)


def load_model(config: StageConfig, hf_config: Any, checkpoint: LowBitCheckpoint | None) -> Any:
    """Load the Hugging Face model, with the outliers that config asks for; without config.model the artifact itself."""
    name, dtype = model_name(config.model or config.artifact or ""), compute_dtype(config)
    with _loading(name):
        if config.model is None and checkpoint is not None:
            model = _from_checkpoint(hf_config, checkpoint, dtype)
            model.generation_config = load_generation_config(name) or model.generation_config
            return model
        model = _from_folder(download(name), dtype)
    if config.inject_outliers is not None:
        inject_outliers(model, config.inject_outliers, config.inject_at, config.seed)
    return model


def _from_folder(folder: str, dtype: torch.dtype) -> Any:
    """Load the model that a folder holds, whatever stands before all names of its weights."""
    from transformers import AutoModelForCausalLM

    check_safetensors(folder)
    options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}  # no code of the model's own
    load = partial(AutoModelForCausalLM.from_pretrained, folder, output_loading_info=True, **options)
    stored: Any = load()
    model, info = stored
    if info["missing_keys"]:
        mapping = prefix_mapping(model, HFWeights(folder).files)
        if mapping:
            stored = load(key_mapping=mapping)
            model, info = stored
    if info["missing_keys"]:
        raise LowBitError(lacking(folder, info["missing_keys"], info["unexpected_keys"], model))
    ModelWeights(folder, model).check_dtypes(f"{name}.weight" for name in huggingface.find_linears(model))
    return model


@contextlib.contextmanager
def _loading(name: str | Path) -> Iterator[None]:
    """Raise what transformers, safetensors, tokenizers and the hub client do as one line; hide what they print."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            yield
    except LowBitError:
        raise
    except Exception as error:
        raise LowBitError(f"cannot load model {str(name)!r}: {one_line(error)}") from None


def _from_checkpoint(hf_config: Any, checkpoint: LowBitCheckpoint, dtype: torch.dtype) -> Any:
    """Build a model without full-precision linears: zeros that take no memory stand for them until they are swapped.

    (An engine that shards the model copies its share of those zeros; the swap frees them again.)
    """
    model = skeleton(hf_config, dtype)
    head = checkpoint.head
    if (head is not None and head.embedding is None) or unties(
        model, checkpoint.tensors, checkpoint.tensors.__getitem__
    ):
        untie(hf_config)
        model = skeleton(hf_config, dtype)
    placeholder = torch.zeros(1, 1, dtype=dtype)
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in checkpoint.tensors.items()}
    for name in checkpoint.linears:
        shape = model.get_submodule(name).weight.shape
        state[f"{name}.weight"] = placeholder.expand(shape)
    for name in checkpoint.experts.weights if checkpoint.experts is not None else ():
        state[name] = placeholder.unsqueeze(0).expand(model.get_parameter(name).shape)
    if head is not None:
        shape = len(head.weight.packed_weight), head.weight.in_features
        state |= dict.fromkeys(head.replaced, placeholder.expand(shape))
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    lacks = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    lacks += [name for name, _ in stored_buffers(model) if name not in state]
    if lacks or unexpected:
        raise LowBitError(
            f"the artifact lacks {(lacks or unexpected)[0]} of the model in its config.json; write it again"
        )
    projection = model.get_output_embeddings()
    if projection is not None:
        # torch's linear copies a whole frozen weight for a slice of the hidden states, such as the last token's: a
        # quarter of a second at every prompt, with 32,000 words of 1,024 channels.
        projection.weight.requires_grad_(True)
    model._lowbit_fingerprint = checkpoint.fingerprint
    return model
