"""Compares artifacts by what lies in their folders."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

CHECKSUMS = ("files", "beside", "json_sha256")


def differing(one: Path, other: Path) -> list[str]:
    """What differs between the artifacts of two folders: tensors to the last bit, JSON but for checksums of files."""
    found = []
    for pattern in ("lowbit", "comm_plan_tp*"):
        stems = {path.stem for folder in (one, other) for path in folder.glob(f"{pattern}.json")}
        for stem in sorted(stems):
            tensors, metas = [], []
            for folder in (one, other):
                if not (folder / f"{stem}.json").exists():
                    return [f"{stem} is not in {folder.name}"]
                metas.append(json.loads((folder / f"{stem}.json").read_text()))
                files = folder.glob(f"{stem}*.safetensors")
                tensors.append({name: tensor for file in files for name, tensor in load_file(file).items()})
            keys = [key for key in metas[0].keys() | metas[1].keys() if key not in CHECKSUMS]
            found += [f"{stem}: {key}" for key in keys if metas[0].get(key) != metas[1].get(key)]
            found += [f"{stem}: {name}" for name in tensors[0].keys() ^ tensors[1].keys()]
            for name in tensors[0].keys() & tensors[1].keys():
                a, b = tensors[0][name], tensors[1][name]
                if a.dtype != b.dtype or not a.equal(b):
                    found.append(f"{stem}: {name}")
    return found
