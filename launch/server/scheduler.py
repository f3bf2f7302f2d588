"""Which sequences run: rank 0 decides before each step and tells the others, so that all run the same batch.

    every rank, again and again
        plan = what rank 0 says: prompts that come in, sequences that go
        one more token of each sequence in flight (Batch.advance); rank 0 chooses the tokens, and all hear them

An idle server waits at most IDLE seconds before a step without work: ranks that wait for the next plan hear that rank 0
is there, and a rank that has died is noticed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.saturation import measure_saturation
from megatron_lowbit.launch.server.jobs import Failure, Job
from megatron_lowbit.launch.server.sampling import NotFinite
from megatron_lowbit.runtime.distributed import PreemptionCheck, on_rank_zero

logger = logging.getLogger("megatron_lowbit")
T = TypeVar("T")

IDLE = 1.0  # seconds
MEASURE_EVERY = 5.0  # seconds between looks at how well the ranges hold, on all ranks
PROMPT_TOKENS = 2048  # that come in at one step, so that long prompts do not hold up all others; one prompt always may


class Full(Exception):
    """The queue has no room."""


class Scheduler:
    """Rank 0's queue. The server's threads submit and cancel, the thread that runs the model does the rest."""

    def __init__(self, max_batch: int, max_queue: int):
        self.max_batch, self.max_queue = max_batch, max_queue
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Job] = {}
        self.generated = self.prompted = 0  # tokens
        self.saturation: dict[str, Any] = {}
        self.beat = time.monotonic()  # the newest plan
        self._closed: Failure | None = None
        self._number = 0
        self._measured = 0.0
        self._changed = threading.Condition()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the sequences of a request, all or none. Raises Full where they do not fit."""
        with self._changed:
            if self._closed is not None:
                for job in jobs:
                    job.fail(self._closed)
                return
            if len(self.waiting) + len(jobs) > self.max_queue + max(self.max_batch - len(self.running), 0):
                raise Full
            self.waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Stop sequences whose client has gone: their places are free at the next step."""
        with self._changed:
            for job in jobs:
                job.over = True
            self.waiting = deque(job for job in self.waiting if not job.over)

    def close(self, failure: Failure) -> None:
        """End all sequences, and those that still come."""
        with self._changed:
            self._closed = failure
            for job in (*self.waiting, *self.running.values()):
                if not job.over:
                    job.fail(failure)
            self.waiting.clear()
            self._changed.notify()

    def plan(self) -> dict[str, Any]:
        """Return what the next step does: {"add": [[number, ids, whether to score them]], "drop": [numbers],
        "measure": whether it is time to, "stop": whether it is the last}."""
        with self._changed:
            if not self.waiting and not self.running and self._closed is None:
                self._changed.wait(IDLE)
            self.beat = now = time.monotonic()
            for job in (*self.waiting, *self.running.values()):
                if now > job.deadline and not job.over:
                    job.fail(Failure(503, "timeout", "the request took longer than the server's timeout; try again"))
            drop = [number for number, job in self.running.items() if job.over]
            for number in drop:
                del self.running[number]
            add: list[list[Any]] = []
            room = PROMPT_TOKENS
            while self.waiting and len(self.running) < self.max_batch:
                if add and len(self.waiting[0].prompt) > room:
                    break
                job = self.waiting.popleft()
                if job.over:
                    continue
                room -= len(job.prompt)
                self._number += 1
                self.running[self._number] = job
                self.prompted += len(job.prompt)
                add.append([self._number, job.prompt, job.scored])
            measure = now - self._measured > MEASURE_EVERY
            if measure:
                self._measured = now
            return {"add": add, "drop": drop, "measure": measure, "stop": self._closed is not None}

    def score(self, number: int, logits: Tensor) -> bool:
        """Tell the log-probabilities of a prompt; returns whether its sequence is over with that."""
        job = self.running[number]
        if not job.over:
            self._guard(job, lambda: job.score(logits))
        return job.over

    def sample(self, numbers: Sequence[int], logits: Tensor) -> list[int]:
        """Return the next token of each sequence, of logits [sequences, vocab]. 0 for those that are over."""
        return [self._next(self.running[number], row) for number, row in zip(numbers, logits, strict=True)]

    def _next(self, job: Job, logits: Tensor) -> int:
        token = None if job.over else self._guard(job, lambda: job.take(logits))
        if token is None:
            return 0
        self.generated += 1
        return token

    def _guard(self, job: Job, action: Callable[[], T]) -> T | None:
        """Do something for one sequence; what goes wrong ends this sequence, and no other."""
        try:
            return action()
        except NotFinite as error:
            job.fail(Failure(500, "server_error", f"no token could be chosen: {error}"))
        except Exception:  # whatever a tokenizer's code raises at these tokens
            logger.exception("a sequence failed")
            job.fail(Failure(500, "server_error", "the server failed at this request; its log says why"))
        return None


def run_batches(engine: Engine, batch: Any, scheduler: Scheduler | None) -> None:
    """Run the sequences that rank 0's scheduler has, until it is closed or a signal asks to stop; every rank calls
    it."""
    stop = PreemptionCheck()
    while stop.step() != stop.STOP:
        plan = on_rank_zero(lambda: scheduler.plan())  # type: ignore[union-attr]
        if plan["stop"]:
            break
        scored = {number for number, ids, score in plan["add"] if score and _score(engine, scheduler, number, ids)}
        add = [(number, ids) for number, ids, _ in plan["add"] if number not in scored]
        batch.advance(add, plan["drop"], partial(_sample, scheduler, engine.text_config.vocab_size))
        if plan["measure"]:
            seen = measure_saturation(engine)
            if scheduler is not None:
                scheduler.saturation = seen


def _sample(scheduler: Scheduler | None, vocab: int, numbers: list[int], logits: Tensor) -> list[int]:
    """Return rank 0's choice, on all ranks; logits may be padded beyond the vocabulary."""
    return on_rank_zero(lambda: scheduler.sample(numbers, logits[:, :vocab]))  # type: ignore[union-attr]


@torch.inference_mode()
def _score(engine: Engine, scheduler: Scheduler | None, number: int, ids: list[int]) -> bool:
    """Run a whole prompt for its own log-probabilities; returns whether nothing is to follow it."""
    logits = engine(torch.tensor([ids])).logits[0]
    return on_rank_zero(lambda: scheduler.score(number, logits))  # type: ignore[union-attr]
