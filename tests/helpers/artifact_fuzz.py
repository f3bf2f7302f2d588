"""Artifacts changed at random, loaded and applied: each ends as the original does, or in one LowBitError.

Two kinds of change. `damage` is what disks, editors and interrupted copies do: checksums stay as they were, so whatever
still loads has to give the logits of the original. `forge` also puts all checksums right again, as a bug in a writer
would: then the values may be others, but what does not fit together is a LowBitError, never another exception.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from tiny_models import logits, token_ids
from torch import nn

from megatron_lowbit.adapters import patching
from megatron_lowbit.adapters.huggingface.apply import apply_to_huggingface
from megatron_lowbit.comm.plan import CalibrationStats
from megatron_lowbit.config import LowBitError

VALUES = [None, True, 0, 1, -1, 2, 3, 5, 7, 16, 1.5, 2.0, -0.5, 1e300, 2**70, "", "x", "W4A4", "W9A9", "W16A16", "none"]
VALUES += [[], [1], [2, 3], ["x"], {}, {"x": 1}, [[1, 2], [3]], "../lowbit.safetensors", "/etc/passwd", "\ud800", "\0"]
OURS = ("lowbit", "comm_plan", "calibration")
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int8, torch.bool, torch.uint8, torch.float32]


class ArtifactFuzz:
    """folder: an artifact of `model`, with a plan for two ranks; `work`: an empty folder to change it in."""

    def __init__(self, folder: Path, model: nn.Module, work: Path):
        self.model, self.work = model, work
        beside = json.loads((folder / "lowbit.json").read_text()).get("beside", {})  # config and tokenizer
        names = [f.name for f in sorted(folder.iterdir()) if f.name.startswith(OURS) or f.name in beside]
        self.files = {name: (folder / name).read_bytes() for name in names}
        for name, data in self.files.items():
            (work / name).write_bytes(data)
        self.ids = token_ids(2, 5)
        self.wanted = self._outputs()

    def _outputs(self) -> list[torch.Tensor]:
        """What the artifact in `work` makes of the model, and the statistics that it holds."""
        try:
            apply_to_huggingface(self.model, self.work, 2, "one_shot")
            found = [logits(self.model, self.ids)]
        finally:
            patching.remove(self.model)
        if "calibration.json" in self.files:
            stats = CalibrationStats.load(self.work).ranges
            for size in sorted(stats):
                found += [t for site in sorted(stats[size]) for t in stats[size][site].tensors().values()]
        return found

    def trial(self, seed: int, forge: bool) -> str:
        """same, refused, changed (another result), or `raised ...` for an exception that is no LowBitError."""
        rng = random.Random(f"{seed} {forge}")
        changed = dict(self.files)
        what = (forged if forge else damaged)(rng, changed)
        touched = [name for name in self.files | changed if changed.get(name) != self.files.get(name)]
        try:
            for name in touched:
                self._put(name, changed.get(name))
            try:
                found = self._outputs()
            except LowBitError as error:
                return "refused" if "\n" not in str(error) else f"raised several lines by {what}: {error}"
            except Exception as error:
                return f"raised {type(error).__name__} by {what}: {str(error)[:200]}"
            equal = len(found) == len(self.wanted) and all(map(torch.equal, found, self.wanted))
            return "same" if equal else f"changed by {what}"
        finally:
            for name in touched:
                self._put(name, self.files.get(name))

    def _put(self, name: str, data: bytes | None) -> None:
        """A new file each time: tensors of the one before may still be mapped."""
        (self.work / name).unlink(missing_ok=True)
        if data is not None:
            (self.work / name).write_bytes(data)


def judge(outcomes: list[str], forge: bool) -> list[str]:
    """What must not be: any exception but a LowBitError; and another result, unless the checksums were put right."""
    return [o for o in outcomes if o.startswith("raised") or (o.startswith("changed") and not forge)]


def counts(outcomes: list[str]) -> Counter[str]:
    return Counter(outcome.split(" ")[0] for outcome in outcomes)


# --- Damage


def damaged(rng: random.Random, files: dict[str, bytes]) -> str:
    name = rng.choice(sorted(files))
    data = files[name]
    kinds = ["bit", "cut", "zeros", "more", "lost", "swapped", "text"] + ["json"] * 6 * name.endswith(".json")
    kind = rng.choice(kinds)
    if kind == "bit":
        for _ in range(rng.choice((1, 1, 1, 8))):
            place = rng.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        files[name] = data
    elif kind == "cut":
        files[name] = data[: rng.randrange(len(data))]
    elif kind == "zeros":
        start = rng.randrange(len(data))
        count = min(rng.choice((1, 64, 4096, len(data))), len(data) - start)
        files[name] = data[:start] + bytes(count) + data[start + count :]
    elif kind == "more":
        files[name] = data + rng.randbytes(rng.choice((1, 8, 1000)))
    elif kind == "lost":
        del files[name]
    elif kind == "swapped":
        other = rng.choice(sorted(files))
        files[name], files[other] = files[other], files[name]
        name = f"{name} and {other}"
    elif kind == "text":
        start = rng.randrange(len(data))
        piece = rng.choice([b"{", b"}", b'"', b",", b"NaN", b"1.5", b"\xff", b"9" * 5000, b"[" * 100_000, b"-"])
        files[name] = data[:start] + piece + data[start + rng.choice((0, 1, len(piece))) :]
    else:
        files[name], kind = edited_json(rng, data)
    return f"{kind} of {name}"


def edited_json(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Another JSON text, whose checksums are as they were."""
    value = json.loads(data)
    if rng.random() < 0.15:
        key = rng.choice(sorted(value))
        return data.replace(b"{", b"{" + json.dumps({key: rng.choice(VALUES)})[1:-1].encode() + b",", 1), f"twice {key}"
    if rng.random() < 0.1:
        key = rng.choice(sorted(value))
        deep = b"[" * 100_000 + b"]" * 100_000
        return json.dumps(value | {key: "@"}).encode().replace(b'"@"', rng.choice([deep, b"NaN", b"9" * 5000])), key
    what = edit(rng, value)
    return json.dumps(value, indent=rng.choice((1, None))).encode(), what


def edit(rng: random.Random, value: dict[str, Any]) -> str:
    """Change one entry of a JSON object, at any depth; returns which and how."""
    owner, key = rng.choice(list(places(value)))
    old = owner[key]
    kind = rng.choice(["drop", "value", "value", "near", "rename"])
    if kind == "drop":
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        owner[rng.choice([f"{key}x", key[:-1], "", *owner])] = owner.pop(key)
    elif kind == "near" and type(old) is int:
        owner[key] = rng.choice([old + 1, old - 1, -old, 2 * old, old // 2, old + 0.5, float(old), str(old), True])
    elif kind == "near" and isinstance(old, str) and old:
        place = rng.randrange(len(old))
        owner[key] = old[:place] + rng.choice("0a9Z-./") + old[place + 1 :]
    elif kind == "near" and isinstance(old, list):
        owner[key] = rng.choice([old[::-1], old[:-1], old + old[:1], [*old, None]])
    else:
        owner[key] = copy.deepcopy(rng.choice(VALUES))
    return (
        f"{kind} at {key}: {str(old)[:40]} -> {str(owner[key] if not isinstance(owner, list) else owner)[:40]}"
        if (isinstance(owner, dict) and key in owner)
        else f"{kind} at {key}"
    )


def places(value: Any) -> list[tuple[Any, Any]]:
    """(owner, key) of every entry of nested lists and dicts."""
    if not isinstance(value, (dict, list)):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


# --- Forgery


def forged(rng: random.Random, files: dict[str, bytes]) -> str:
    """Change the tensors or the JSON, and put every checksum right."""
    described = [name for name in files if name.startswith(OURS) and name.endswith(".json")]
    stem = rng.choice(sorted(name.removesuffix(".json") for name in described))
    meta = json.loads(files[f"{stem}.json"])
    owned = sorted(meta["files"]) if "files" in meta else [f"{stem}.safetensors"]
    what = ""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.6:
            name = rng.choice(owned)
            tensors = load(files[name])
            what += " " + TENSOR_CHANGES[rng.randrange(len(TENSOR_CHANGES))](rng, tensors) + f" in {name}"
            files[name] = save(tensors)
        else:
            what += " " + edit(rng, meta)
    with_files = isinstance(meta.get("files"), dict)
    for name in owned:
        checksum = hashlib.sha256(files[name]).hexdigest()
        if with_files and name in meta["files"] and isinstance(meta["files"][name], str):
            meta["files"][name] = checksum
        elif isinstance(meta.get("sha256"), str) and "files" not in meta:
            meta["sha256"] = checksum
    seal(meta)
    files[f"{stem}.json"] = json.dumps(meta).encode()
    return what


def seal(meta: dict[str, Any]) -> None:
    """Put the checksum of a JSON object right: of its other keys, sorted and without white space."""
    rest = {key: value for key, value in meta.items() if key != "json_sha256"}
    meta["json_sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


Tensors = dict[str, torch.Tensor]


def _any(rng: random.Random, tensors: Tensors) -> str:
    return rng.choice(sorted(tensors)) if tensors else ""


def _replace(change: Callable[[random.Random, torch.Tensor], torch.Tensor]) -> Callable[[random.Random, Tensors], str]:
    def apply(rng: random.Random, tensors: Tensors) -> str:
        name = _any(rng, tensors)
        if name:
            tensors[name] = change(rng, tensors[name]).contiguous().clone()
        return f"{change.__name__} {name}"

    return apply


def dtype(rng: random.Random, t: torch.Tensor) -> torch.Tensor:
    return t.to(rng.choice(DTYPES))


def shape(rng: random.Random, t: torch.Tensor) -> torch.Tensor:
    if t.ndim == 0:
        return rng.choice([t.reshape(1), t.repeat(2)])
    kind, dim = rng.randrange(6), rng.randrange(t.ndim)
    if kind == 0:
        return t.t() if t.ndim == 2 else t.unsqueeze(0)
    if kind == 1:
        return t.flatten()
    if kind == 2:
        return t.narrow(dim, 0, t.shape[dim] // 2)
    if kind == 3:
        return torch.cat([t, t.narrow(dim, 0, min(1, t.shape[dim]))], dim)
    if kind == 4:
        return t.narrow(dim, 0, 0)
    return t.unsqueeze(dim)


def values(rng: random.Random, t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    if t.numel() == 0 or t.dtype == torch.bool:
        return t
    flat, place = t.view(-1), rng.randrange(t.numel())
    if t.is_floating_point():
        flat[place] = rng.choice([float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e30])
    else:
        flat[place] = rng.choice([0, 1, 100, 127] + [-1, 2**31 - 1] * (t.dtype != torch.uint8))
    return t


def drop(rng: random.Random, tensors: Tensors) -> str:
    name = _any(rng, tensors)
    tensors.pop(name, None)
    return f"drop {name}"


def rename(rng: random.Random, tensors: Tensors) -> str:
    name, other = _any(rng, tensors), _any(rng, tensors)
    if name:
        tensors[rng.choice([f"{name}x", f"x.{name}", other])] = tensors.pop(name)
    return f"rename {name}"


def extra(rng: random.Random, tensors: Tensors) -> str:
    stem, leaf = _any(rng, tensors).rpartition(".")[0], rng.choice(["lora_a", "src_idx", "scale", "weight", "bias", ""])
    tensors[f"{stem}.{leaf}"] = torch.ones(rng.choice([(), (1,), (64,), (64, 64)]))
    return f"extra {stem}.{leaf}"


def swap(rng: random.Random, tensors: Tensors) -> str:
    a, b = _any(rng, tensors), _any(rng, tensors)
    if a:
        tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()
    return f"swap {a} {b}"


TENSOR_CHANGES = [*map(_replace, (dtype, shape, values, values, shape)), drop, rename, extra, swap]
