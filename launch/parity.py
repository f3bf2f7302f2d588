"""megatron-lowbit parity: does one artifact compute the same in every engine, at every tensor-parallel size?

Every engine runs at every size in processes of its own, on the same prompts, and is compared with Hugging Face in one
process: without virtual ranks where partial sums travel in the model's own dtype, with as many as the other has where
they travel as bf16 or low-bit.

    max|logits - logits_ref| / max|logits_ref|      over all tokens of all prompts
    tokens                                          greedy continuations that are equal, token by token
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_lowbit.adapters.patching import remove
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import CommMode, LowBitError, ParityConfig
from megatron_lowbit.io.files import read_json, write_tensors
from megatron_lowbit.launch.engines.base import GenerateOptions
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.generate import encode
from megatron_lowbit.launch.inputs import read_prompts
from megatron_lowbit.launch.runner import run_stage
from megatron_lowbit.launch.saturation import logged, measure_saturation, print_saturation
from megatron_lowbit.launch.tables import Justify, print_table
from megatron_lowbit.runtime import preemption
from megatron_lowbit.runtime.distributed import on_rank_zero
from megatron_lowbit.runtime.launcher_env import without_launch
from megatron_lowbit.runtime.metrics import MetricLogger, progress
from megatron_lowbit.runtime.preemption import REQUEUE, Preempted

CONFIG = ParityConfig
TIMEOUT = 3600  # seconds of one engine at one size

Outcome = dict[str, Tensor]  # logits.<prompt> [tokens, vocab] and tokens.<prompt> [new tokens]
SAME_SIZE = ("bf16", "one_shot")  # compared with as many virtual ranks


def run(config: ParityConfig, logger: MetricLogger) -> dict[str, Any]:
    if config.outcomes:
        return {"rows": write_outcomes(config)}
    artifact = Artifact.load(config.artifact or "")
    sizes = sorted({1, *config.tp_sizes})
    runs = [("huggingface", size) for size in sizes]  # the references
    runs += [(engine, size) for engine in config.engines if engine != "huggingface" for size in sizes]
    references: dict[int, dict[str, Outcome]] = {}
    rows: list[dict[str, Any]] = []
    for engine, size in progress(runs, len(runs), "running the engines"):
        found = outcomes_of(config, engine, size)
        if engine == "huggingface":
            references[size] = found
        for mode, outcome in found.items() if engine in config.engines else ():
            reference = references[size if mode in SAME_SIZE else 1][mode]
            about: dict[str, Any] = {"name": name_of(artifact, mode), "engine": engine, "tp": size}
            figures, saturation = compare(outcome, reference), saturation_of(config, engine, size, mode)
            rows.append({**about, **figures, **saturation})
            logger.log(**about, **figures, **logged(saturation))
    rows.sort(key=lambda row: (row["name"] != "full precision", config.engines.index(row["engine"])))
    print_rows(rows)
    return {"rows": rows}


def modes(artifact: Artifact, size: int) -> list[CommMode | None]:
    """Return what is compared at a size; None is the unpatched model, `native` all there is at size 1."""
    wanted: list[CommMode | None] = [None]
    if artifact.checkpoint is not None:
        wanted += ["native", "bf16"] if size > 1 else ["native"]
    return wanted + (["one_shot"] if size in artifact.plans and size > 1 else [])


def name_of(artifact: Artifact, mode: str) -> str:
    weights = artifact.checkpoint.scheme_name if artifact.checkpoint else "full precision"
    names = {"None": "full precision", "native": weights, "bf16": f"{weights} + bf16"}
    return names.get(mode, f"{weights} + hybrid")


def write_outcomes(config: ParityConfig) -> list[dict[str, Any]]:
    """Run one engine at one size and write <output_dir>/<mode>.safetensors for every mode, from the engine's ranks."""
    engine = start_engine(config)
    prompts = [encode(engine, prompt) for prompt in on_rank_zero(lambda: read_prompts(config.prompts or ""))]
    artifact = Artifact.load(config.artifact or "")
    found, rows = modes(artifact, engine.tp_size), []
    for mode in found:
        remove(engine.model)
        if mode is not None:
            engine.apply(artifact, mode)
        outcome = {}
        with torch.inference_mode():
            for number, prompt in enumerate(prompts):
                outcome[f"logits.{number}"] = engine(input_ids=torch.tensor([prompt])).logits[0].float()
        generated = engine.generate(prompts, GenerateOptions(config.max_new_tokens))
        outcome |= {f"tokens.{number}": torch.tensor(tokens) for number, tokens in enumerate(generated)}
        path = Path(config.output_dir) / f"{mode}.safetensors"
        on_rank_zero(lambda path=path, outcome=outcome: write_tensors(path, outcome))  # type: ignore[misc]
        rows.append({"name": str(mode), "prompts": len(prompts), **measure_saturation(engine)})
    return rows


def outcomes_of(config: ParityConfig, engine: str, size: int) -> dict[str, Outcome]:
    """Return {mode: outcome}, from processes of their own; raises LowBitError with their last line where they fail."""
    folder = Path(config.output_dir) / f"{engine}-{size}"
    arguments = {
        "outcomes": "true",
        "model": config.model,
        "artifact": config.artifact,
        "engine": engine,
        "virtual_tp" if engine == "huggingface" else "tp": size,
        "prompts": config.prompts,
        "max_new_tokens": config.max_new_tokens,
        "dtype": config.dtype,
        "seed": config.seed,
        "output_dir": folder,
    }
    command = [sys.executable, "-m", "megatron_lowbit.launch", "parity"]
    command += [f"{key}={value}" for key, value in arguments.items()]
    code, stderr = _run(command, preemption.child_of(without_launch(os.environ)))
    if code is None:
        raise LowBitError(f"engine={engine} tp={size} took more than {TIMEOUT} s; give fewer prompts")
    if code == REQUEUE or preemption.asked():
        raise Preempted("it starts over when it is run again")
    if code:
        last = (stderr.strip().splitlines() or ["no message"])[-1]
        raise LowBitError(f"engine={engine} tp={size} failed: {last.removeprefix('megatron-lowbit: ')}")
    wanted = modes(Artifact.load(config.artifact or ""), size)
    return {str(mode): load_file(folder / f"{mode}.safetensors") for mode in wanted}


def _run(command: list[str], environ: dict[str, str]) -> tuple[int | None, str]:
    """Run a command; returns (exit code, standard error), the code None after TIMEOUT; the signals of this process are
    passed on."""
    deadline, forwarded = time.monotonic() + TIMEOUT, 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            while time.monotonic() < deadline:
                for number in preemption.received[forwarded:]:
                    forwarded += 1
                    process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _, stderr = process.communicate(timeout=0.2)
                    return process.returncode, stderr
            return None, ""
        finally:
            process.kill()


def saturation_of(config: ParityConfig, engine: str, size: int, mode: str) -> dict[str, Any]:
    """Return how the plan's ranges held, as the engine's own processes have reported."""
    rows = read_json(Path(config.output_dir) / f"{engine}-{size}" / "parity.json")["rows"]
    return {
        key: value
        for row in rows
        if row["name"] == mode
        for key, value in row.items()
        if key not in ("name", "prompts")
    }


def compare(outcome: Outcome, reference: Outcome) -> dict[str, Any]:
    """Return the largest difference of logits, relative to the largest logit, and the tokens that agree."""
    pairs = {key: (outcome[key], reference[key]) for key in sorted(reference)}
    logits = [pair for key, pair in pairs.items() if key.startswith("logits.")]
    tokens = [(new.tolist(), want.tolist()) for key, (new, want) in pairs.items() if key.startswith("tokens.")]
    largest = max(want.abs().max().item() for _, want in logits)
    return {
        "max_relative_difference": max((new - want).abs().max().item() for new, want in logits) / largest,
        "argmax_equal": sum(int((new.argmax(-1) == want.argmax(-1)).sum()) for new, want in logits),
        "prompt_tokens": sum(len(want) for _, want in logits),
        "tokens_equal": sum(_common(new, want) for new, want in tokens),
        "new_tokens": sum(len(want) for _, want in tokens),
        "prompts_equal": sum(new == want for new, want in tokens),
        "prompts": len(tokens),
    }


def _common(new: list[int], want: list[int]) -> int:
    """Return the number of tokens before the first that differs."""
    same = torch.tensor([a == b for a, b in zip(new, want, strict=False)], dtype=torch.int64)
    return int(same.cumprod(0).sum())


def print_rows(rows: list[dict[str, Any]]) -> None:
    columns: dict[str, Justify] = {
        "name": "left",
        "engine": "left",
        "tp": "right",
        "largest\nrelative\ndifference": "right",
        "argmax\nequal": "right",
        "tokens\nequal": "right",
        "prompts\nequal": "right",
    }
    cells = [
        (
            row["name"],
            row["engine"],
            str(row["tp"]),
            f"{row['max_relative_difference']:.1e}",
            f"{row['argmax_equal']}/{row['prompt_tokens']}",
            f"{row['tokens_equal']}/{row['new_tokens']}",
            f"{row['prompts_equal']}/{row['prompts']}",
        )
        for row in rows
    ]
    print_table(columns, cells, "against Hugging Face in one process (bf16, hybrid: with as many virtual ranks)")
    print_saturation({**row, "name": f"{row['name']}, {row['engine']}, tp={row['tp']}"} for row in rows)


if __name__ == "__main__":
    sys.exit(run_stage("parity", sys.argv[1:]))
