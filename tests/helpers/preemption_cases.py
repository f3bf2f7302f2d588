"""Cases for the ranks of test_preemption.py: no framework but torch."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from megatron_lowbit.comm.calibration import ParallelGroups, calibrate
from megatron_lowbit.config import CalibrateConfig
from megatron_lowbit.launch import main
from megatron_lowbit.qllm.resume import PassState
from megatron_lowbit.runtime import preemption
from megatron_lowbit.runtime.distributed import PreemptionCheck
from megatron_lowbit.runtime.preemption import Preempted

BATCHES = 9


class Model(nn.Module):
    """Ids to a row-parallel linear that is looked at."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.site = nn.Embedding(11, 8), nn.Linear(8, 6)

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.site(self.embed(input_ids)))


def calibrate_with_a_signal(rank: int, size: int, folder: str) -> tuple[list[int], dict[str, Any], dict[str, Any]]:
    """(batches done at each stop, digests of an undisturbed pass, of one that rank 1 is told to leave twice)."""
    config, model = CalibrateConfig(output_dir=folder), Model()
    ids = torch.randint(0, 11, (BATCHES, 2, size, 5), generator=torch.Generator().manual_seed(3))[:, :, rank]
    mask = torch.ones(2, 5, dtype=torch.bool)

    def one_pass(state: PassState | None, leave_at: int | None = None) -> dict[str, int]:
        def batches():
            for number in range(0 if state is None else state.done, BATCHES):
                if number == leave_at and rank == 1:
                    os.kill(os.getpid(), signal.SIGUSR1)
                yield ids[number], mask

        stats = calibrate(
            *(model, {"site": model.site}, batches(), [2], {"weights": {}}, 0.1),
            groups=ParallelGroups(dp=dist.group.WORLD),
            histograms=True,
            state=state,
        )
        return {
            f"{s}.{field}": zlib.crc32(getattr(found, field).numpy().tobytes())
            for s, by_site in stats.ranges.items()
            for found in by_site.values()
            for field in ("min_vals", "max_vals", "mean", "std", "crest", "clipped")
        }

    whole, stops = one_pass(None), []
    for leave_at in (3, 5):
        before = preemption.install()
        state = PassState(config, {}, BATCHES)
        try:
            one_pass(state, leave_at)
        except Preempted:
            stops.append(state.done)
        finally:
            preemption.restore(before)
    return stops, whole, one_pass(PassState(config, {}, BATCHES))


def command(rank: int, size: int, port: int, argv: list[str], signals: dict[int, int], moment: str) -> tuple[int, str]:
    """(exit code, what was printed) of a command that a launcher starts on these ranks, ranks joining at `port`.

    signals: {rank: signal} that ranks send themselves at `moment`: a file's path, then | and text that it has to hold.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)
    over = threading.Event()

    def strike() -> None:
        file, _, text = moment.partition("|")
        while not over.is_set():
            with contextlib.suppress(OSError):
                if text in Path(file).read_text():
                    os.kill(os.getpid(), signals[rank])
                    return
            over.wait(0.001)

    thread = threading.Thread(target=strike)
    printed = io.StringIO()
    if rank in signals:
        thread.start()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return main(argv), printed.getvalue()
    finally:
        over.set()


def steps_until_stopped(rank: int, size: int, lag: int, step: int) -> int:
    """At which step this rank stops when the other gets its signal before step `step`."""
    before, watch = preemption.install(), PreemptionCheck(lag=lag)
    try:
        for number in range(20):
            if number == step and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if watch.step() == PreemptionCheck.STOP:
                return number
        return -1
    finally:
        preemption.restore(before)
