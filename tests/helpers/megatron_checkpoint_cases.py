"""What workers of a RankPool run for test_megatron_checkpoint.py: `case(rank, size, *args)`."""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron_cases import module_ids
from megatron_groups import parallel
from megatron_model_cases import differing, said, stage_logits
from rich.console import Console
from torch import Tensor
from torch import distributed as dist

import megatron_lowbit as lowbit
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.runtime import metrics


def hf_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def with_weights(folder: Path, **options: Any) -> Any:
    """This rank's GPTModel of a Hugging Face folder, in full precision."""
    from megatron_lowbit.adapters.megatron import model as megatron_model

    config = hf_config(folder)
    return megatron_model.load_weights(megatron_model.build(config, **options), folder, config)


def applied(folder: Path, artifact: Artifact | Path | None, **options: Any) -> Any:
    model = with_weights(folder, **options)
    return model if artifact is None else lowbit.apply_to_megatron(model, artifact)


def plain(folder: Path, scheme: str | None = None, **options: Any) -> Any:
    """A GPTModel as a user builds it before it loads a checkpoint, with NaN where it has to be loaded."""
    from megatron_lowbit.adapters.megatron import model as megatron_model
    from megatron_lowbit.adapters.megatron.spec import block_spec, llama_spec, lowbit_spec

    config, spec = hf_config(folder), None
    if scheme is not None:
        spec = lowbit_spec(block_spec(megatron_model.transformer_config(config), llama_spec()), scheme)
    model = megatron_model.build(config, spec=spec, **options)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def traits(model: Any) -> dict[str, Any]:
    """What of a low-bit model is in no tensor of its state_dict."""
    from megatron_lowbit.adapters.megatron.layout import find_linears

    found: dict[str, Any] = {}
    for key, (_, layer) in find_linears(model).items():
        if not hasattr(layer, "low_bit"):
            found[str(key)] = type(layer).__name__
            continue
        linear = layer.low_bit.shards[0] if layer.is_row else layer.low_bit
        plan = getattr(getattr(layer.low_bit, "reducer", None), "plan", None)
        found[str(key)] = {
            "class": type(layer).__name__,
            "linear": str(linear),
            "branch": getattr(linear, "lora_a", None) is not None,
            "reassembly": getattr(linear, "reassembly", None) is not None,
            "sent": None if plan is None else {name: t.tolist() for name, t in plan.tensors().items()},
            "gathered": getattr(layer, "gather", None) is not None,
        }
    for name, module in model.named_modules():
        if type(module).__name__ == "LowBitNorm":
            found[name] = module.reassembled is not None
    return found


def compare(loaded: Any, expected: Any, vocab: int) -> dict[str, Any]:
    mine, other = stage_logits(loaded, vocab), stage_logits(expected, vocab)
    return {
        "differing": differing(tensors(loaded), tensors(expected)),
        "traits": [key for key, value in traits(expected).items() if traits(loaded).get(key) != value],
        "logits_equal": torch.equal(mine, other) and bool(torch.isfinite(mine[..., :vocab]).all()),
        "tensors": len(tensors(loaded)),
    }


def keys_of(model: Any) -> set[str]:
    """Keys of a model's tensors in Megatron's distributed checkpoints."""
    return {tensor.key for tensor in model.sharded_state_dict().values() if hasattr(tensor, "data")}


@contextlib.contextmanager
def writers() -> Iterator[None]:
    """Megatron writes from processes of its own: a pool's worker, a daemon, may start none, and has to end them."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    settings: Any = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    daemon, settings["daemon"] = settings["daemon"], False
    try:
        yield
    finally:
        settings["daemon"] = daemon
        queue: Any = filesystem_async._results_queue
        if queue is not None:
            queue._manager.shutdown()
        filesystem_async._results_queue = None


def save(
    rank: int, size: int, tp: int, pp: int, jobs: Sequence[tuple[Path, Artifact | Path | None, Path]], **options: Any
) -> None:
    """Each (model folder, artifact or None, checkpoint folder)."""
    from megatron_lowbit.adapters.megatron import checkpoint as megatron_checkpoint

    with parallel(tp, pp), writers():
        for model, artifact, folder in jobs:
            megatron_checkpoint.save_checkpoint(applied(model, artifact, **options), folder)


def load(
    rank: int, size: int, tp: int, pp: int, jobs: dict[str, tuple[Path, Artifact | Path | None, Path]], **options: Any
) -> dict[str, dict[str, Any]]:
    """{name: a plain model with the checkpoint loaded, against the artifact applied at this size}."""
    from megatron_lowbit.adapters.megatron import checkpoint as megatron_checkpoint

    results = {}
    with parallel(tp, pp):
        for name, (model, artifact, folder) in jobs.items():
            loaded = plain(model, **options)
            assert megatron_checkpoint.load_checkpoint(loaded, folder) is loaded
            vocab = hf_config(model).vocab_size
            results[name] = compare(loaded, applied(model, artifact, **options), vocab)
    return results


def save_sequence_parallel(rank: int, size: int, job: tuple[Path, Artifact | Path | None, Path]) -> None:
    save(rank, size, size, 1, [job], sequence_parallel=True)


def load_sequence_parallel(rank: int, size: int, job: tuple[Path, Artifact | Path | None, Path]) -> dict[str, Any]:
    return load(rank, size, size, 1, {"": job}, sequence_parallel=True)[""]


def rounded_on_load(
    rank: int, size: int, model: Path, scheme: str, artifact: Artifact, checkpoint: Path
) -> dict[str, Any]:
    """A full-precision checkpoint in a model built to round, against the whole weights rounded and then sharded."""
    from megatron_lowbit.adapters.megatron import checkpoint as megatron_checkpoint

    with parallel(size):
        loaded = plain(model, scheme)
        before = {type(module).__name__ for module in loaded.modules() if getattr(module, "low_bit", None) is not None}
        megatron_checkpoint.load_checkpoint(loaded, checkpoint)
        outcome = compare(loaded, applied(model, artifact), hf_config(model).vocab_size)
        return {**outcome, "before": before, "saved": megatron_checkpoint_names(loaded)}


def megatron_checkpoint_names(model: Any) -> int:
    """How many tensors of codes the model would put into a checkpoint."""
    return sum("packed_weight" in key for key in model.sharded_state_dict())


def stock_route(rank: int, size: int, model: Path, artifact: Path, folder: Path) -> dict[str, Any]:
    """Megatron's own calls on a patched model; they load into one that holds other codes of the same shapes."""
    from megatron.core import dist_checkpointing

    with parallel(size), writers():
        saved, target = applied(model, artifact), applied(model, artifact)
        for tensor in tensors(target).values():
            tensor.copy_(torch.zeros_like(tensor))
        assert differing(tensors(target), tensors(saved))
        if rank == 0:
            folder.mkdir()
        dist.barrier()
        dist_checkpointing.save(saved.sharded_state_dict(), str(folder))
        target.load_state_dict(dist_checkpointing.load(target.sharded_state_dict(), str(folder)))
        return compare(target, saved, hf_config(model).vocab_size)


def tensors(model: Any) -> dict[str, Tensor]:
    """The state_dict without Megatron's empty extra states."""
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def refused_loads(
    rank: int, size: int, model: Path, artifact: Artifact | None, folders: dict[str, Path]
) -> dict[str, tuple[str, bool]]:
    """{name: (what load_checkpoint says, whether the model is as it was)}; the model has an artifact, or none."""
    from megatron_lowbit.adapters.megatron import checkpoint as megatron_checkpoint

    results = {}
    with parallel(size):
        for name, folder in folders.items():
            target = applied(model, artifact)
            before = {key: t.clone() for key, t in tensors(target).items()}
            modules, vocab = module_ids(target), hf_config(model).vocab_size
            logits = stage_logits(target, vocab)
            message = said(megatron_checkpoint.load_checkpoint, target, folder)
            same = module_ids(target) == modules and not differing(tensors(target), before)
            results[name] = message, same and torch.equal(stage_logits(target, vocab), logits)
    return results


def refused_save(rank: int, size: int, model: Path, artifact: Artifact | None, folder: Path) -> str:
    from megatron_lowbit.adapters.megatron import checkpoint as megatron_checkpoint

    with parallel(size), writers():
        return said(megatron_checkpoint.save_checkpoint, applied(model, artifact), folder)


def interrupted_save(rank: int, size: int, model: Path, folder: Path) -> dict[str, Any]:
    """The disk is full halfway through; then it has room again."""
    from megatron.core import dist_checkpointing

    from megatron_lowbit.adapters.megatron import checkpoint as megatron_checkpoint

    with parallel(size), writers():
        gpt, save_all = with_weights(model), dist_checkpointing.save

        def fail(state: Any, path: str, *args: Any, **kwargs: Any) -> None:
            save_all(state, path, *args, **kwargs)
            raise OSError(28, "No space left on device")

        dist_checkpointing.save = fail
        try:
            megatron_checkpoint.save_checkpoint(gpt, folder)
            raised = "nothing"
        except Exception as error:  # whatever comes through
            raised = str(error)
        finally:
            dist_checkpointing.save = save_all
        dist.barrier()
        left, loads = folder.exists(), said(megatron_checkpoint.load_checkpoint, gpt, folder)
        dist.barrier()
        megatron_checkpoint.save_checkpoint(gpt, folder)
        loaded = megatron_checkpoint.load_checkpoint(plain(model), folder)
        again = compare(loaded, gpt, hf_config(model).vocab_size)
        return {"raised": raised, "left": left, "loads": loads, "again": again, "parts": list_hidden(folder.parent)}


def saved_with_a_bar(rank: int, size: int, model: Path, folder: Path) -> tuple[str, int, int]:
    """(what a terminal gets, the bytes that the bar expects, those of the tensors in the checkpoint)."""
    from megatron_lowbit.adapters.megatron import checkpoint as megatron_checkpoint

    text, watch = io.StringIO(), megatron_checkpoint.folder_progress
    console = partial(Console, file=text, force_terminal=True, width=80)
    with parallel(size), writers():
        gpt = with_weights(model)
        with (
            mock.patch.object(metrics, "Console", lambda stderr: console()),
            mock.patch.object(megatron_checkpoint, "folder_progress", wraps=watch) as bar,
        ):
            megatron_checkpoint.save_checkpoint(gpt, folder)
        found = megatron_checkpoint._metadata(folder / "release").values()
    stored = sum(math.prod(tensor.global_shape) * tensor.dtype.itemsize for tensor in found)
    return text.getvalue(), bar.call_args.args[1], stored


def list_hidden(folder: Path) -> list[str]:
    dist.barrier()
    return sorted(path.name for path in folder.glob(".*"))
