"""What workers of a RankPool run for test_megatron_inference.py: `case(rank, size, *args)`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny_models
import torch
from megatron_cases import gpt_model, inputs, token_ids
from megatron_checkpoint_cases import with_weights
from megatron_groups import parallel
from megatron_model_cases import said
from megatron_training_cases import backward
from torch import Tensor

import megatron_lowbit as lowbit
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.runtime.preemption import Preempted

Model = Path | tuple[str, dict[str, Any]]  # a folder, or a tiny model's architecture and changed config fields
TINY: Model = ("llama", {})
Run = tuple[list[tuple[list[int], int]], dict[str, Any]]  # (prompt, new tokens) of every request; options of generate


def _built(model: Model, artifact: Artifact | Path | None, sequence_parallel: bool = False) -> Any:
    if isinstance(model, Path):
        gpt = with_weights(model, sequence_parallel=sequence_parallel)
    else:
        gpt = gpt_model(tiny_models.build(model[0], **model[1]), sequence_parallel)
    return gpt if artifact is None else lowbit.apply_to_megatron(gpt, artifact)


def generated(
    rank: int,
    size: int,
    model: Model,
    artifact: Artifact | Path | None,
    runs: dict[str, Run],
    sequence_parallel: bool = False,
    pp: int = 1,
) -> dict[str, tuple[list[list[int]], list[tuple[int, int]]]]:
    """{name: (new tokens of every request, what on_token was told, in order)}; one model serves all runs."""
    results = {}
    with parallel(size // pp, pp):
        from megatron_lowbit.adapters.megatron.inference import Request, generate

        gpt = _built(model, artifact, sequence_parallel)
        for name, (requests, options) in runs.items():
            told: list[tuple[int, int]] = []
            asked = [Request(prompt, new) for prompt, new in requests]
            made = generate(gpt, asked, on_token=lambda *pair, told=told: told.append(pair), **options)
            results[name] = made, told
    return results


def stopped(rank: int, size: int, model: Model, runs: dict[str, Run]) -> dict[str, tuple[int, int]]:
    """{name: (steps, tokens told) when on_step raised at the fourth}, on as many pipeline stages as ranks."""
    results = {}
    with parallel(1, size):
        from megatron_lowbit.adapters.megatron.inference import Request, generate

        gpt = _built(model, None)
        for name, (requests, options) in runs.items():
            told: list[tuple[int, int]] = []
            steps = 0

            def on_step() -> None:
                nonlocal steps
                steps += 1
                if steps == 4:
                    raise Preempted("here")

            asked = [Request(prompt, new) for prompt, new in requests]
            with contextlib.suppress(Preempted):
                generate(gpt, asked, on_token=lambda *pair, told=told: told.append(pair), on_step=on_step, **options)
            results[name] = steps, len(told)
    return results


def refused(
    rank: int,
    size: int,
    model: Model,
    runs: dict[str, Run],
    sequence_parallel: bool = False,
    accepted: dict[str, Any] | None = None,
) -> dict[str, tuple[str, int]]:
    """{name: (what is said, tokens made before)}; the model works afterwards."""
    results = {}
    with parallel(size):
        from megatron_lowbit.adapters.megatron.inference import Request, generate

        gpt = _built(model, None, sequence_parallel)
        for name, (requests, options) in runs.items():
            told: list[tuple[int, int]] = []
            asked = [Request(prompt, new) for prompt, new in requests]
            serve = partial(generate, gpt, asked, on_token=lambda *pair, told=told: told.append(pair), **options)
            results[name] = said(serve), len(told)
        assert len(generate(gpt, [Request([5, 6], 2)], **(accepted or {}))[0]) == 2
    return results


def trained_after(rank: int, size: int, sequence_parallel: bool) -> dict[str, float]:
    """Losses of a training step, by what has run the model before it in a process that has run nothing else.

    All windows are of one length: Megatron keeps tensors between calls, and uses again what is large enough.
    """
    with parallel(size):
        from megatron.core import parallel_state

        from megatron_lowbit.adapters.megatron.inference import Request, generate
        from megatron_lowbit.quality import measure_quality

        gpt, ids = _built(TINY, None, sequence_parallel), token_ids()

        def causal_lm(input_ids: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=gpt(*inputs(input_ids), runtime_gather_output=True))

        ways: dict[str, Callable[[], Any]] = {
            "nothing": lambda: None,
            "generate": lambda: generate(gpt, [Request(ids[0].tolist(), 2)]),
            "evaluate": lambda: measure_quality(causal_lm, [(ids, torch.ones_like(ids, dtype=torch.bool))], 0),
        }
        losses = {}
        for name, run in ways.items():
            parallel_state.get_global_memory_buffer().buffer.clear()
            gpt.eval()
            run()
            losses[name] = backward(gpt.train()).item()
        return losses


def come_and_go(
    rank: int, size: int, artifact: Artifact | None, arrivals: list[tuple[int, list[int]]], new_tokens: int
) -> list[list[int]]:
    """Greedy tokens of a server's requests, (step in which it comes, prompt), each of which is dropped when it has
    enough."""
    from megatron_lowbit.adapters.megatron.inference import DynamicBatch

    made: list[list[int]] = [[] for _ in arrivals]

    def sample(numbers: list[int], logits: Tensor) -> list[int]:
        for number, token in zip(numbers, logits.argmax(-1).tolist(), strict=True):
            made[number].append(token)
        return [made[number][-1] for number in numbers]

    with parallel(size):
        batch = DynamicBatch(_built(TINY, artifact), max_batch=len(arrivals))
        for step in range(max(step for step, _ in arrivals) + new_tokens + 2):
            add = [(number, ids) for number, (arrival, ids) in enumerate(arrivals) if arrival == step]
            drop = [number for number, (arrival, _) in enumerate(arrivals) if arrival + new_tokens == step]
            batch.advance(add, drop, sample)
        assert not batch.engine.has_unfinished_requests() and not batch.controller.over
    return made
