"""States of unfinished runs changed at random, and the run continued: the artifact of a run that nobody touched, or one
LowBitError."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from artifact_fuzz import damaged
from safetensors.torch import load
from tiny_models import batches, build

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.comm.calibration import calibrate
from megatron_lowbit.comm.plan import CalibrationStats
from megatron_lowbit.config import CalibrateConfig, LowBitError, QuantizeConfig, load_config
from megatron_lowbit.io.data import Windows
from megatron_lowbit.launch.loading import read_config
from megatron_lowbit.qllm import resume
from megatron_lowbit.qllm.block_source import BlockSource
from megatron_lowbit.qllm.pipeline import BlockwiseQuantizer
from megatron_lowbit.runtime.metrics import MetricLogger

SETTINGS = [
    *("weights.scheme=W4A4", "reassembly.expansions=[0.05]", "correction.blocks_per_group=1", "correction.epochs=1"),
    *(
        "correction.rank=auto",
        "correction.rank_budget=2",
        "correction.batch_size=2",
        "calibration.samples=4",
        "comm.tp_sizes=[2]",
    ),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


class ResumeFuzz:
    """One kind of run: `run(folder)` returns what it ends with, `states` are the folders it was interrupted with."""

    def __init__(self, run: Callable[[Path], dict[str, Any]], states: list[dict[str, bytes]], work: Path):
        self.run, self.states, self.work = run, states, work
        self.wanted = self._continued(states[-1])
        assert all(equal(self._continued(state), self.wanted) for state in states)

    def _continued(self, files: dict[str, bytes]) -> dict[str, Any]:
        shutil.rmtree(self.work, ignore_errors=True)
        for name, data in files.items():
            (self.work / name).parent.mkdir(parents=True, exist_ok=True)
            (self.work / name).write_bytes(data)
        return self.run(self.work)

    def trial(self, seed: int) -> str:
        """same, refused, changed (another artifact), or `raised ...` for an exception that is no LowBitError."""
        rng = random.Random(f"{seed}")
        # Mostly the last state, from which little is left to do.
        files = dict(rng.choices(self.states, [1] * (len(self.states) - 1) + [20])[0])
        what = damaged(rng, files)
        try:
            found = self._continued(files)
        except LowBitError as error:
            return "refused" if "\n" not in str(error) else f"raised several lines by {what}: {error}"
        except Exception as error:
            return f"raised {type(error).__name__} by {what}: {str(error)[:200]}"
        return "same" if equal(found, self.wanted) else f"changed by {what}"


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a
    )


def tensors_of(stats: CalibrationStats) -> dict[str, torch.Tensor]:
    return {
        f"{size}.{site}.{name}": tensor
        for size, sites in stats.ranges.items()
        for site, ranges in sites.items()
        for name, tensor in ranges.tensors().items()
    }


def quantize_runs(model: Path, root: Path) -> ResumeFuzz:
    """Method qllm on the model in `model`: states after every group of blocks."""
    ids = torch.randint(3, 1000, (4, 64), generator=torch.Generator().manual_seed(0))
    windows, hf_config = Windows(ids, torch.ones_like(ids, dtype=torch.bool)), read_config(model)
    saved: list[dict[str, bytes]] = []

    def run(folder: Path) -> dict[str, Any]:
        config = load_config(QuantizeConfig, None, [*SETTINGS, f"model={model}", f"output_dir={folder}"])
        source = BlockSource(model, hf_config, config, torch.float32, torch.device("cpu"), None)
        logger = MetricLogger(root, "quantize", {}, rank=1)  # which writes none
        quantizer = BlockwiseQuantizer(source, windows, config, [2], None, logger)
        save = quantizer.state.save

        def save_and_copy(*args: Any, **values: Any) -> Any:
            parts = save(*args, **values)
            saved.append(contents(folder))
            return parts

        quantizer.state.save = save_and_copy  # type: ignore[method-assign]
        stats = quantizer.run(lambda output: None)
        found = {name: data for name, data in contents(folder).items() if not name.startswith("resume")}
        for name in [name for name in found if name.endswith(".safetensors")]:  # bytes may hold another order
            found |= {f"{name}/{key}": tensor for key, tensor in load(found.pop(name)).items()}
        return found | tensors_of(stats)

    (root / "whole").mkdir()
    run(root / "whole")
    return ResumeFuzz(run, list(saved), root / "work")


def calibrate_runs(root: Path, monkeypatch: Any) -> ResumeFuzz:
    """A calibration pass that saves after every batch."""
    model, saved = build("llama"), []
    monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(resume, "SAVE_SHARE", float("inf"))  # however long that takes
    sites, fingerprint = huggingface.row_parallel_sites(model), huggingface.fingerprint(model)

    def run(folder: Path) -> dict[str, Any]:
        state = resume.PassState(CalibrateConfig(output_dir=str(folder)), {"text": "x"}, 3)
        state.watch.save_every = 0.0
        after = state.after_batch

        def after_and_copy(seen: Any) -> None:
            after(seen)
            saved.append(contents(folder))

        state.after_batch = after_and_copy  # type: ignore[method-assign]
        rest = islice(batches(), state.done, None)
        return tensors_of(calibrate(model, sites, rest, (2,), fingerprint, gamma=0.25, state=state))

    (root / "whole").mkdir()
    run(root / "whole")
    return ResumeFuzz(run, saved[:2], root / "work")
