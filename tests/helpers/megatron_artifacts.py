"""Artifacts that several of Megatron's tests save, load and run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tiny_models
from commands import CALIBRATION, run_here

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.comm.calibration import calibrate
from megatron_lowbit.config import CommConfig, WeightsConfig
from megatron_lowbit.quant.affine import LowRank
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.round_to_nearest import quantize_model


def quantize_embedded(folder: Path, **changes: object) -> Path:
    """All that an artifact can hold, from the embedded model: reassembled norms, o_proj and down_proj, low-rank
    branches, quantized attention, and plans for two and four ranks."""
    settings = {
        "model": "embedded",
        "weights.method": "qllm",
        "weights.scheme": "W4A4",
        "weights.shard_groups": 4,
        "reassembly.mode": "fixed",
        "reassembly.expansion": 0.05,
        "reassembly.o_proj": "true",
        "correction.mode": "branch",
        "correction.epochs": 1,
        "comm.tp_sizes": "[2,4]",
        "output_dir": folder,
    }
    assert run_here("quantize", *(f"{key}={value}" for key, value in (settings | changes).items()), *CALIBRATION) == 0
    return folder


def gather_artifact(sizes: tuple[int, ...], scheme: str = "W4A8") -> Artifact:
    """A tiny llama's weights, and plans with ranges for the all-gather of sequence parallelism; a sixteenth of the
    features travels in bfloat16."""
    model = tiny_models.build("llama")
    linears = huggingface.find_linears(model)
    sites, readers = huggingface.row_parallel_sites(model), huggingface.first_readers(linears)
    print_of_model = huggingface.fingerprint(model)
    stats = calibrate(model, sites, tiny_models.batches(), sizes, print_of_model, gamma=0.25, inputs=readers)
    config = CommConfig(preset="paper", gather=True, bf16_fraction=1 / 16)
    modules = {name: module for name, (_, module) in linears.items()}
    weights = quantize_model(model, modules, WeightsConfig(scheme=scheme), print_of_model)
    return Artifact(weights, {size: build_plan(stats, size, config) for size in sizes})


def in_some_blocks(artifact: Artifact) -> Artifact:
    """The artifact with reassembly in the even blocks alone, and low-rank branches in the first three, of half the rank
    on the MLP's first linear and in the second block."""
    checkpoint = artifact.checkpoint
    assert checkpoint is not None

    def block(name: str) -> int:
        return int(name.split(".")[2])

    def branch_of(name: str, branch: LowRank) -> LowRank:
        rank = len(branch.lora_a) // 2 if block(name) == 1 or name.endswith("gate_proj") else len(branch.lora_a)
        return LowRank(branch.lora_a[:rank].clone(), branch.lora_b[:, :rank].clone())

    return Artifact(
        replaced(
            checkpoint,
            reassembly={name: plan for name, plan in checkpoint.reassembly.items() if block(name) % 2 == 0},
            low_rank={name: branch_of(name, b) for name, b in checkpoint.low_rank.items() if block(name) < 3},
        ),
        artifact.plans,
    )


def replaced(checkpoint: LowBitCheckpoint, **changes: Any) -> LowBitCheckpoint:
    return dataclasses.replace(checkpoint, **changes)
