"""What a killed run is continued from: <output_dir>/resume.

    state.json              settings, groups done, the parts of the checkpoint so far, results
    ranges-<done>/          CalibrationStats of the groups done
    hp-<done>-rank<r>.bin, lowbit-<done>-rank<r>.bin     the two streams before the next group

Everything that a group adds has a name of its own and is written before state.json, which is replaced at once: whatever
the moment of a kill, state.json and the files it speaks of belong together.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_lowbit.artifacts import (
    CalibrationStats,
    CheckpointPart,
    FeatureRange,
    merge_parts,
    remove_leftovers,
    verify_files,
)
from megatron_lowbit.config import LowBitError, QuantizeConfig, defaults
from megatron_lowbit.files import ensure_writable, read_json, write_json

_FREE_KEYS = ("output_dir", "wandb", "dry_run", "architecture")  # may differ when a run is resumed


class RunState:
    """The state of one run. inputs: {what: digest} of what the settings only name (text, weights).

    Only rank 0 calls `find`, `save` and `forget`.
    """

    def __init__(self, config: QuantizeConfig, inputs: dict[str, str]):
        self.output = Path(config.output_dir)
        self.folder = self.output / "resume"
        values = {key: value for key, value in defaults(config).items() if key not in _FREE_KEYS}
        self.settings: dict[str, Any] = json.loads(json.dumps({**values, **inputs}))
        # Parts are named without the numbers of ranks: those do not change the artifact.
        named = {key: value for key, value in self.settings.items() if key not in ("tp", "dp")}
        self.run_name = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]

    def part_path(self, name: str) -> Path:
        return self.output / f"lowbit-{self.run_name}-{name}.safetensors"

    def find(self) -> dict[str, Any]:
        """state.json of an unfinished run, or {"done": 0} after making the folder for a fresh one.

        Raises LowBitError for a run of other settings, naming them, and for one whose files are gone or damaged.
        """
        if not (self.folder / "state.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            ensure_writable(self.folder)
            remove_leftovers(self.output)
            return {"done": 0}
        found = read_json(self.folder / "state.json")
        if not {"settings", "done", "parts", "bit_sums", "results"} <= set(found):
            raise LowBitError(f"{str(self.folder)!r} is damaged; delete the folder to start the run over")
        before, here = found["settings"], self.settings
        changed = [key for key in {**before, **here} if before.get(key) != here.get(key)]
        if changed:
            listed = ", ".join(f"{key} {before.get(key)!r} there, {here.get(key)!r} here" for key in changed[:6])
            raise LowBitError(
                f"{str(self.folder)!r} is an unfinished run with other settings ({listed}); "
                "repeat those to continue it, delete the folder to start over, or choose another output_dir"
            )
        try:
            verify_files(self.output, merge_parts(found["parts"]))
        except LowBitError as error:
            raise LowBitError(f"{error}; delete {str(self.folder)!r} to start the run over") from None
        keep = tuple(f"{name}-{found['done']}-" for name in ("hp", "lowbit"))
        for stream in self.folder.glob("*.bin"):
            if not stream.name.startswith(keep):
                stream.unlink()
        return found

    def ranges(self, done: int) -> dict[int, dict[str, FeatureRange]]:
        return CalibrationStats.load(self.folder / f"ranges-{done}").ranges

    def save(
        self,
        done: int,
        part: CheckpointPart,
        parts: list[dict[str, Any]],
        ranges: dict[int, dict[str, FeatureRange]],
        **values: Any,
    ) -> list[dict[str, Any]]:
        """Write what the group added, then state.json; returns the descriptions of all parts."""
        parts = [*parts, part.save(self.part_path(f"{done - 1:03d}"))]
        CalibrationStats(ranges, {"weights": {}}).save(ensure_writable(self.folder / f"ranges-{done}"))
        state = {"settings": self.settings, "done": done, "parts": parts, **values}
        write_json(self.folder / "state.json", state)
        shutil.rmtree(self.folder / f"ranges-{done - 1}", ignore_errors=True)
        return parts

    def forget(self) -> None:
        """Delete the state: all that the run was to write is written."""
        (self.folder / "state.json").unlink(missing_ok=True)  # first, or what is left would look like a run to continue
        shutil.rmtree(self.folder, ignore_errors=True)
