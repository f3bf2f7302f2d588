"""`quantize` in this process, and what it has written."""

import json
from pathlib import Path

from commands import run_here


def quantize(folder: Path, *settings: object) -> Path:
    """Run the command with `folder` as its output_dir; returns the folder."""
    assert run_here("quantize", *settings, f"output_dir={folder}") == 0
    return folder


def checksums(folder: Path) -> dict[str, str]:
    """Return {end of a tensor file's name: SHA-256}; the names themselves begin with a digest of the settings."""
    meta = json.loads((folder / "lowbit.json").read_text())
    return {name.split("-")[-1]: checksum for name, checksum in meta["files"].items()}
