"""save_pretrained of a patched model: a folder that loads again.

The state of a patched model holds packed weights under names that transformers does not know; it would fill in random
ones for what it misses. So save_pretrained writes an artifact instead, with the model's config, generation config and
tokenizer beside it: apply_to_* and the commands' artifact= take the folder. Where only the communication is low-bit,
it writes the full-precision model as ever, with the communication plans beside it.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.adapters import deepspeed_guard, patching
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.plan import remove_plans
from megatron_lowbit.config import LowBitError, one_line
from megatron_lowbit.io.fingerprint import Fingerprint, check_fingerprint
from megatron_lowbit.io.hf_names import untie
from megatron_lowbit.quant.checkpoint import TOKENIZER_FILES, LowBitCheckpoint

logger = logging.getLogger("megatron_lowbit")


def save_as_artifact(model: Any, artifact: Artifact, fingerprint: Callable[[Any], Fingerprint] | None = None) -> None:
    """Have model.save_pretrained write what the patched model is, and DeepSpeed's own export refuse it; undone by
    `remove`.

    fingerprint: of the whole model, without patch; None where every rank holds a share of it: then the first writes.
    """
    object.__setattr__(model, "save_pretrained", ArtifactSaver(model, artifact, fingerprint))
    deepspeed_guard.guard_engines()


class ArtifactSaver:
    """The save_pretrained of one patched model."""

    def __init__(self, model: Any, artifact: Artifact, fingerprint: Callable[[Any], Fingerprint] | None):
        self.model, self.artifact, self.fingerprint = model, artifact, fingerprint

    def __deepcopy__(self, memo: dict[int, Any]) -> ArtifactSaver:
        # Artifacts are not copied: nobody changes one.
        return ArtifactSaver(copy.deepcopy(self.model, memo), self.artifact, self.fingerprint)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        deepspeed_guard.guard_engines()  # a new process has not patched anything

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        variant: str | None = None,
        **options: Any,
    ) -> None:
        """Write the folder; the arguments are those of transformers' save_pretrained, of which the size of a shard has
        no effect.

        Raises LowBitError for push_to_hub and variant, which an artifact does not have.
        """
        for key, value in (("push_to_hub", push_to_hub), ("variant", variant)):
            if value:
                raise LowBitError(
                    f"save_pretrained: {key}={value!r} is not supported for a low-bit model; leave it out"
                )
        if not is_main_process or (self.fingerprint is None and dist.get_rank() != 0):
            return
        folder = Path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.artifact.checkpoint is None:
                self._save_full_precision(folder, state_dict, options)
            else:
                self._save_low_bit(folder, self.artifact.checkpoint, state_dict)
        except (OSError, ValueError) as error:  # ValueError: a generation config that transformers refuses
            raise LowBitError(f"cannot write to {str(folder)!r}: {one_line(error)}") from None

    def _save_low_bit(self, folder: Path, checkpoint: LowBitCheckpoint, state: dict[str, Tensor] | None) -> None:
        if state is None and any(hasattr(parameter, "ds_id") for parameter in self.model.parameters()):
            raise LowBitError(
                "save_pretrained: ZeRO stage 3 spreads the weights over the ranks; pass a whole state_dict="
            )
        config = copy.deepcopy(self.model.config)
        config.architectures = config.architectures or [type(self.model).__name__]
        if checkpoint.rotation is not None and checkpoint.rotation.residual:
            untie(config)
        config.save_pretrained(folder)
        if getattr(self.model, "generation_config", None) is not None:
            self.model.generation_config.save_pretrained(folder)
        self._copy_tokenizer(folder)
        remove_plans(folder)
        for plan in self.artifact.plans.values():
            plan.save(folder)
        current = self.model.state_dict() if state is None else state
        tensors = {name: _newest(tensor, current.get(name)) for name, tensor in checkpoint.tensors.items()}
        replace(checkpoint, tensors=tensors).save(folder)  # last: its JSON says that the artifact is whole

    def _save_full_precision(self, folder: Path, state: dict[str, Tensor] | None, options: dict[str, Any]) -> None:
        if self.fingerprint is None:
            raise LowBitError("save_pretrained: the ranks share these full-precision weights; save the unsharded model")
        if state is not None:
            raise LowBitError(
                "save_pretrained: state_dict= has no effect on a model of low-bit communication; leave it out"
            )
        with _originals_in_place(self.model):
            type(self.model).save_pretrained(self.model, folder, **options)
            here = self.fingerprint(self.model)
        self._copy_tokenizer(folder)
        remove_plans(folder)
        for plan in self.artifact.plans.values():
            try:
                check_fingerprint("the communication plan", plan.fingerprint, here)
            except LowBitError:
                logger.warning("the weights were trained since calibration, so no communication plan is saved")
                return
            plan.save(folder)

    def _copy_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files from the folder of the artifact or, without one, of the model, where that has a
        tokenizer."""
        name = getattr(self.model.config, "_name_or_path", None)
        for source in (self.artifact.folder, Path(name) if name else None):
            found = [] if source is None else [file for p in TOKENIZER_FILES for file in source.glob(p)]
            if found:
                for file in found:
                    if file.is_file() and not (folder / file.name).exists():
                        shutil.copyfile(file, folder / file.name)
                return


@contextmanager
def _originals_in_place(model: nn.Module) -> Iterator[None]:
    """Restore the original modules within the context: the model computes, and is saved, as before it was patched."""
    patched = patching.replacing_modules(model)
    saver = vars(model).pop("save_pretrained")
    for name, original in patching.original_modules(model).items():
        model.set_submodule(name, original)
    try:
        yield
    finally:
        for name, module in patched.items():
            model.set_submodule(name, module)
        object.__setattr__(model, "save_pretrained", saver)


def _newest(stored: Tensor, current: Tensor | None) -> Tensor:
    """Return a tensor as it is now, in the stored dtype, where it was trained; else what is stored, to the bit."""
    if current is None or current.shape != stored.shape:  # replaced by a low-bit module, or this rank's share
        return stored
    current = current.detach().to(stored.device)
    return stored if torch.equal(stored.to(current.dtype), current) else current.to(stored.dtype)
