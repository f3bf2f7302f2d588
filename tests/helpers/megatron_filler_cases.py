"""GPTModels that fill themselves, built and loaded as Megatron-LM's scripts do: cases for test_megatron_filler.py."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_checkpoint_cases import applied, compare, hf_config, writers
from megatron_groups import parallel
from megatron_model_cases import said

SCRIPT = {"load": None, "pretrained_checkpoint": None, "ckpt_step": None, "train_iters": None, "train_samples": None}


@contextlib.contextmanager
def script(artifact: Path | None, **arguments: Any) -> Iterator[Namespace]:
    """Inside, this process looks as if it ran a script with these arguments, and the environment named the artifact."""
    from megatron_lowbit.adapters.megatron.filler import ENVIRONMENT

    args = Namespace(**{**SCRIPT, **arguments})
    modules = {"megatron.training.global_vars": types.SimpleNamespace(_GLOBAL_ARGS=args)}
    environment = {} if artifact is None else {ENVIRONMENT: str(artifact)}
    with mock.patch.dict(sys.modules, modules), mock.patch.dict(os.environ, environment):
        yield args


def built(model: Path, name: str = "llama_lowbit_spec", **options: Any) -> Any:
    """The GPTModel of a script with `--spec megatron_lowbit.adapters.megatron NAME`."""
    from megatron.core.transformer.spec_utils import import_module

    from megatron_lowbit.adapters.megatron import model as megatron_model

    spec = import_module(("megatron_lowbit.adapters.megatron", name))
    return megatron_model.build(hf_config(model), spec=spec, **options)


def load(gpt: Any, folder: Path) -> None:
    """Load a checkpoint as Megatron-LM's load_checkpoint does: its tensors are asked for by the metadata in it."""
    from megatron.core import dist_checkpointing, parallel_state

    stored = folder / "release"
    common = dist_checkpointing.load_common_state_dict(str(stored))
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    assert common["args"].num_layers == gpt.config.num_layers and common["checkpoint_version"] == 3.0
    state = {"args": None, "model": gpt.sharded_state_dict(metadata=metadata)}
    gpt.load_state_dict(dist_checkpointing.load(state, str(stored))["model"], strict=True)


def filled(
    rank: int, size: int, tp: int, pp: int, model: Path, artifact: Path, how: str, checkpoints: dict[str, Path]
) -> dict[str, Any]:
    """The filled model against apply_to_megatron. how: "alone", or which of the checkpoints is loaded."""
    with parallel(tp, pp):
        from megatron_lowbit.adapters.megatron import training

        folder = checkpoints.get(how)
        environment = None if how == "low-bit" else artifact
        with (
            script(environment, load=None if folder is None else str(folder)),
            mock.patch.object(training.logger, "warning") as warning,
        ):
            gpt = built(model)
            if folder is not None:
                load(gpt, folder)
            outcome = compare(gpt, applied(model, artifact), hf_config(model).vocab_size)
        return outcome | {"warned": [str(call.args) for call in warning.call_args_list]}


def save(rank: int, size: int, tp: int, jobs: dict[Path, tuple[Path, Path | None]]) -> None:
    """{checkpoint folder: (model, artifact or None)}."""
    from megatron_lowbit.adapters.megatron.checkpoint import save_checkpoint

    with parallel(tp), writers():
        for folder, (model, artifact) in jobs.items():
            save_checkpoint(applied(model, artifact), folder)


def refused(
    rank: int, size: int, tp: int, jobs: dict[str, tuple[Path, Path, dict[str, Any]]]
) -> dict[str, tuple[str, int]]:
    """{name: (what building says, how many layers were built)} of (model, artifact, arguments of the script)."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    build_layer, found, layers = TransformerLayer.__init__, {}, []

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        layers.append(self)
        build_layer(self, *args, **kwargs)

    with parallel(tp), mock.patch.object(TransformerLayer, "__init__", counted):
        for name, (model, artifact, arguments) in jobs.items():
            layers.clear()
            with script(artifact, **arguments):
                message = said(built, model)
            found[name] = message, len(layers)
    return found


def block(rank: int, size: int, model: Path, artifact: Path) -> dict[str, Any]:
    """A ready block spec under sequence parallelism, against an artifact applied to our own model."""
    with parallel(size), script(artifact) as args:
        from megatron_lowbit.adapters.megatron import model as megatron_model

        config = megatron_model.transformer_config(hf_config(model), sequence_parallel=True)
        arguments = types.SimpleNamespace(core_transformer_config_from_args=lambda given: {id(args): config}[id(given)])
        with mock.patch.dict(sys.modules, {"megatron.training.arguments": arguments}):
            gpt = built(model, "llama_lowbit_block_spec", sequence_parallel=True)
        return compare(gpt, applied(model, artifact, sequence_parallel=True), hf_config(model).vocab_size)
