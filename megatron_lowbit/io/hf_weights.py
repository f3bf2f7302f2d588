"""Tensors of a Hugging Face checkpoint, read one by one from its safetensors files: never the whole model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lowbit.config import LowBitError, one_line
from megatron_lowbit.io.files import parse_json

FULL_PRECISION = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

PICKLES = ("pytorch_model*.bin", "model*.bin", "*.pt", "*.pth", "*.ckpt")


def check_safetensors(folder: str | Path) -> None:
    """Raise LowBitError for a folder that holds its weights as pickles only, since reading those can run any code, and
    for a file whose header does not fit its size, as a download that was cut short leaves it."""
    folder = Path(folder)
    found = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if found and not any(folder.glob("*.safetensors")):
        raise LowBitError(
            f"{str(folder)!r} holds its weights as pickles ({found[0]}), which can run any code when they are read; "
            "where you trust their author, load the model with transformers and save_pretrained it, which writes "
            "safetensors"
        )
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise LowBitError(f"{str(path)!r} is damaged ({one_line(error)}); download it again") from None


class HFWeights:
    """The safetensors file(s) of a model folder. Every error is a LowBitError that names the file or tensor."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        check_safetensors(self.folder)
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        try:
            if index.exists():
                self.files = {
                    name: self.folder / file for name, file in parse_json(index.read_text())["weight_map"].items()
                }
            elif single.exists():
                with safe_open(single, "pt") as file:
                    self.files = dict.fromkeys(file.keys(), single)
            else:
                raise LowBitError(f"{str(folder)!r} holds no model.safetensors; save the model with safetensors")
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise LowBitError(f"cannot read the weights of {str(folder)!r}: {one_line(error)}") from None
        for path in sorted(set(self.files.values())):
            if not path.exists():
                raise LowBitError(f"{str(folder)!r} lacks the shard {path.name}; download it again")

    def digest(self) -> str:
        """Return sixteen digits that change with the weights: of every file's size, and its first and last megabyte."""
        sha = hashlib.sha256()
        for path in sorted(set(self.files.values())):
            size = path.stat().st_size
            with open(path, "rb") as file:
                sha.update(str(size).encode() + file.read(2**20))
                file.seek(max(size - 2**20, 0))
                sha.update(file.read())
        return sha.hexdigest()[:16]

    def read(self, name: str, shape: torch.Size, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Read tensor `name`, or its slice start:stop along `dim`, as it is stored. `shape` is what the model
        expects."""
        if name not in self.files:
            raise LowBitError(f"{str(self.folder)!r} lacks the weight {name}; download it again")
        try:
            with safe_open(self.files[name], "pt") as file:
                stored = file.get_slice(name)
                found = tuple(stored.get_shape())
                if found != tuple(shape):
                    raise LowBitError(
                        f"{name} in {self.files[name].name} has shape {list(found)}, the config asks for {list(shape)}"
                    )
                if not shape:
                    tensor = file.get_tensor(name)
                else:
                    tensor = stored[tuple([slice(None)] * dim + [slice(start, stop)])]
        except (OSError, SafetensorError) as error:
            raise LowBitError(f"cannot read {name} from {str(self.files[name])!r}: {one_line(error)}") from None
        self._check_dtype(name, tensor.dtype)
        return tensor

    def whole(self, name: str) -> Tensor:
        """Read tensor `name` as it is stored, of whatever shape."""
        try:
            with safe_open(self.files[name], "pt") as file:
                tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise LowBitError(f"cannot read {name} from {str(self.files[name])!r}: {one_line(error)}") from None
        self._check_dtype(name, tensor.dtype)
        return tensor

    def check_dtypes(self, names: Iterable[str]) -> None:
        """Raise LowBitError where one of these tensors is no full-precision one. Names that are not stored are skipped.

        The values in the files count, whatever dtype config.json declares: a float32 checkpoint whose config says
        bfloat16 is quantized from its float32 values, as transformers loads it. Eight bits or integers are the codes
        of a model that was quantized before, and no weights without the scales beside them.
        """
        for name in names:
            if name in self.files:
                try:
                    with safe_open(self.files[name], "pt") as file:
                        stored = file.get_slice(name)
                        self._check_dtype(name, stored[:0].dtype if stored.get_shape() else file.get_tensor(name).dtype)
                except (OSError, SafetensorError) as error:
                    raise LowBitError(f"cannot read {name} from {str(self.files[name])!r}: {one_line(error)}") from None

    def _check_dtype(self, name: str, dtype: torch.dtype) -> None:
        if dtype not in FULL_PRECISION:
            kind = str(dtype).removeprefix("torch.")
            raise LowBitError(
                f"{name} in {self.files[name].name} is stored as {kind}; a full-precision model is needed"
            )
