"""Save what a killed run is continued from: <output_dir>/resume.

    state.json              stage, settings, what is done, and the checksum of every file that holds it
  of quantize
    rotation.safetensors    the matrices of weights.rotation=learned, before the first group
    ranges-<done>/          CalibrationStats of the groups done
    hp-<done>-rank<r>.bin, lowbit-<done>-rank<r>.bin     the two streams before the next group
  of calibrate
    observers-<done>-rank<r>.safetensors                 what rank r's observers have seen in the batches done

Everything new has a name of its own and is written before state.json, which is replaced at once: whatever the moment of
a kill, state.json and the files it speaks of belong together. state.json is sealed (files.py), and each rank verifies
what it goes on from, so a run never continues from anything but what was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.comm.plan import CalibrationStats, Ranges
from megatron_lowbit.config import CalibrateConfig, LowBitError, QuantizeConfig, RatesConfig, defaults
from megatron_lowbit.io.files import (
    SEAL,
    check_seal,
    complete,
    discard,
    ensure_writable,
    read_json,
    read_tensors,
    sha256,
    write_sealed,
    write_tensors,
)
from megatron_lowbit.quant.checkpoint import CheckpointPart, merge_parts, verify_files
from megatron_lowbit.runtime.distributed import PreemptionCheck, all_gather_values, on_every_rank, on_rank_zero
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.preemption import Preempted

# These may differ when a run is resumed. The output projection is rounded after all blocks, which do not depend on it;
# a preset is what the other keys hold; what is exported is the artifact.
_FREE_KEYS = (
    *("output_dir", "wandb", "dry_run", "architecture", "export", "weights.lm_head_bits", "weights.preset"),
    *(f"rates.{key}" for key in RatesConfig.model_fields),
)
# These came after the first artifacts, whose states and names of parts stay what they were where they are as usual.
_LATER_KEYS = (
    *("weights.clipping", "weights.rounding", "weights.rotation", "weights.zero_point"),
    "correction.clipping_rate",
)
STATE = 3  # counts the changes of what a state holds
SAVE_EVERY = 60.0  # seconds of a calibration pass
SAVE_SHARE = 1 / 20  # of the time, at most: where saving itself takes long, it is done less often


class State:
    """Keep a stage's unfinished work. inputs: {what: digest} of what the settings only name (text, weights)."""

    def __init__(self, stage: str, config: CalibrateConfig, inputs: dict[str, str]):
        self.output = Path(config.output_dir)
        self.folder = self.output / "resume"
        values = {key: value for key, value in defaults(config).items() if key not in _FREE_KEYS}
        if values.get("weights.budget") is None:
            values.pop("weights.budget", None)  # states and names of parts are what they were before there was one
        if values["comm.scale"] == "per_token":
            values["comm.scale"] = "rank1"  # its first name: states and names of parts stay what they were
        usual = defaults(QuantizeConfig())
        for key in _LATER_KEYS:
            if key in values and values[key] == usual[key]:
                del values[key]
        if values.get("weights.rotation") != "learned":
            values = {key: value for key, value in values.items() if not key.startswith("rotation.")}
        self.settings: dict[str, Any] = json.loads(json.dumps({"stage": stage, "state": STATE, **values, **inputs}))

    def found(self, *keys: str) -> dict[str, Any] | None:
        """Return state.json of an unfinished run; None, and an empty folder, where there is none.

        Raises LowBitError for a run of another stage or other settings, naming them, and for a damaged file.
        """
        if not (self.folder / "state.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            ensure_writable(self.folder)
            return None
        path = self.folder / "state.json"
        with self._start_over():
            found = read_json(path, nan=True)  # a loss may be one
            if SEAL in found:  # an earlier version wrote none; its settings differ in "state"
                check_seal(path, found)
        before, here = found.get("settings", {}), self.settings
        if not isinstance(before, dict):
            before = {}
        changed = [key for key in {**before, **here} if before.get(key) != here.get(key)]
        if before and changed:
            listed = ", ".join(f"{key} {before.get(key)!r} there, {here.get(key)!r} here" for key in changed[:6])
            raise LowBitError(
                f"{str(self.folder)!r} is an unfinished run with other settings ({listed}); "
                "repeat those to continue it, delete the folder to start over, or choose another output_dir"
            )
        done = found.get("done")
        least = 0 if "rotation" in found else 1  # a learned rotation comes before the first group
        if not {"settings", SEAL, *keys} <= set(found) or type(done) is not int or done < least:
            raise LowBitError(f"{str(self.folder)!r} is damaged; delete the folder to start the run over")
        return found

    @contextlib.contextmanager
    def _start_over(self) -> Iterator[None]:
        """Add what to do to a LowBitError that is raised inside the context, where the state is read."""
        try:
            yield
        except LowBitError as error:
            what = str(error).removesuffix("; write it again")
            raise LowBitError(f"{what}; delete {str(self.folder)!r} to start the run over") from None

    def forget(self) -> None:
        """Delete the state: all that the run was to write is written."""
        (self.folder / "state.json").unlink(missing_ok=True)  # first, or what is left would look like a run to continue
        shutil.rmtree(self.folder, ignore_errors=True)


class RunState(State):
    """Keep the state of one run of quantize. Only rank 0 calls `find`, `save` and `forget`."""

    def __init__(self, config: QuantizeConfig, inputs: dict[str, str]):
        super().__init__("quantize", config, inputs)
        # Parts are named without the numbers of ranks: those do not change the artifact.
        named = {key: value for key, value in self.settings.items() if key not in ("tp", "dp")}
        self.run_name = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]

    def part_path(self, name: str) -> Path:
        """Return the path of a part of the checkpoint: a group's number, or "rest", with "-head" and its bits."""
        return self.output / f"lowbit-{self.run_name}-{name}.safetensors"

    def find(self) -> dict[str, Any]:
        """Return state.json of an unfinished run, or {"done": 0} after making the folder for a fresh one.

        Raises LowBitError for a run of other settings, naming them, and for one whose files are gone or damaged.
        """
        found = self.found("parts", "bit_sums", "results", "files")
        if found is None:
            return {"done": 0}
        with self._start_over(), complete(self.folder / "state.json"):
            verify_files(self.output, merge_parts(found["parts"]))
        keep = tuple(f"{name}-{found['done']}-" for name in ("hp", "lowbit"))
        for stream in self.folder.glob("*.bin"):
            if not stream.name.startswith(keep):
                stream.unlink()
        return found

    def save_rotation(self, matrices: dict[str, Tensor]) -> str:
        """Write learned matrices and a state with no group done; return the file's checksum."""
        checksum = write_tensors(self._rotation_path, matrices)
        nothing = {"done": 0, "parts": [], "bit_sums": {}, "results": [], "files": {}}
        write_sealed(self.folder / "state.json", {"settings": self.settings, **nothing, "rotation": checksum})
        return checksum

    def rotation(self, checksum: str) -> dict[str, Tensor]:
        """Return what `save_rotation` has written."""
        with self._start_over():
            return read_tensors(self._rotation_path, checksum)

    @property
    def _rotation_path(self) -> Path:
        return self.folder / "rotation.safetensors"

    def ranges(self, found: dict[str, Any]) -> Ranges:
        """Return the ranges that finished groups have recorded; `found` is what `find` returned."""
        path = self._ranges_path(found["done"])
        with self._start_over(), complete(self.folder / "state.json"):
            verify_files(self.folder, {"files": {_inside(path): found["files"][_inside(path)]}})
            return CalibrationStats.load(path.parent).ranges

    def save(
        self, done: int, part: CheckpointPart, parts: list[dict[str, Any]], ranges: Ranges, **values: Any
    ) -> list[dict[str, Any]]:
        """Write what the group added, then state.json; returns the descriptions of all parts.

        values: `files` {stream: its checksum} of all ranks, and what else the run needs.
        """
        parts = [*parts, part.save(self.part_path(f"{done - 1:03d}"))]
        path = self._ranges_path(done)
        CalibrationStats(ranges, {"weights": {}}).save(ensure_writable(path.parent))
        values["files"] = {**values["files"], _inside(path): sha256(path)}
        write_sealed(self.folder / "state.json", {"settings": self.settings, "done": done, "parts": parts, **values})
        shutil.rmtree(self._ranges_path(done - 1).parent, ignore_errors=True)
        return parts

    def _ranges_path(self, done: int) -> Path:
        """Return the path of the JSON of the ranges, which holds the checksum of their tensors."""
        return self.folder / f"ranges-{done}" / "calibration.json"


def _inside(path: Path) -> str:
    """Return the name that state.json gives to a file of a folder of the state."""
    return f"{path.parent.name}/{path.name}"


def of_all_ranks(mine: dict[str, str]) -> dict[str, str]:
    """Return {file: checksum} of every rank's files. A collective call."""
    every = all_gather_values(mine, dist.group.WORLD if dist.is_initialized() else None)
    return {name: checksum for part in every for name, checksum in part.items()}


class PassState(State):
    """Keep the state of a calibration pass, which may stop after any of its `total` batches.

    All ranks make it and call it together. done: batches that need not be read again; tensors: what this rank's
    observers held after them.
    lag: how many batches the first pipeline stage may be ahead of the last.
    """

    def __init__(self, config: CalibrateConfig, inputs: dict[str, str], total: int, lag: int = 0):
        super().__init__("calibrate", config, inputs)
        self.total, self.watch = total, PreemptionCheck(SAVE_EVERY, lag)
        found = on_rank_zero(partial(self.found, "files"))
        self.done: int = found["done"] if found else 0
        self.tensors: dict[str, Tensor] = on_every_rank(lambda: self._load(found["files"])) if found else {}
        if found and env_rank() == 0:
            print(f"continuing after {self.done} of the {total} batches")

    def after_batch(self, observer_tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Save from time to time. Raises Preempted, after saving, once any rank is to stop."""
        self.done += 1
        if self.done == self.total:  # what is left takes no time
            self.watch.close()
            return
        answer = self.watch.step()
        if answer != PreemptionCheck.GO:
            began = time.monotonic()
            self._save(observer_tensors())
            self.watch.save_every = max(SAVE_EVERY, (time.monotonic() - began) / SAVE_SHARE)
        if answer == PreemptionCheck.STOP:
            raise Preempted(f"after {self.done} of {self.total} batches; the same command continues there")

    def _path(self) -> Path:
        return self.folder / f"observers-{self.done}-rank{env_rank()}.safetensors"

    def _load(self, files: dict[str, str]) -> dict[str, Tensor]:
        with self._start_over():
            return read_tensors(self._path(), files.get(self._path().name, ""))

    def _save(self, tensors: dict[str, Tensor]) -> None:
        files = of_all_ranks({self._path().name: on_every_rank(lambda: write_tensors(self._path(), tensors))})
        state = {"settings": self.settings, "done": self.done, "files": files}
        on_rank_zero(lambda: write_sealed(self.folder / "state.json", state))
        for old in self.folder.glob(f"observers-*-rank{env_rank()}.safetensors"):
            if old.name not in files:
                discard(old)
