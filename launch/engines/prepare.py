"""What a stage does with an engine before it runs: round weights, read texts, calibrate ranges, make an artifact."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from megatron_lowbit.adapters import patching
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.adapters.huggingface.experts import attach_experts, require_experts
from megatron_lowbit.adapters.huggingface.head import quantize_head
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.agreement import digest
from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.comm.calibration import ParallelGroups, calibrate
from megatron_lowbit.comm.plan import CalibrationStats
from megatron_lowbit.comm.reducers import is_low_bit
from megatron_lowbit.config import (
    PLAN_KEYS,
    CalibrateConfig,
    CommConfig,
    LowBitError,
    WeightsConfig,
)
from megatron_lowbit.io.data import Windows, token_windows
from megatron_lowbit.launch.choices import tell_shard_groups
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.full_precision import tell_full_precision
from megatron_lowbit.launch.inputs import no_data
from megatron_lowbit.launch.tokenizer import check_tokenizer
from megatron_lowbit.qllm.resume import PassState
from megatron_lowbit.qllm.rotate_model import rotate_model
from megatron_lowbit.quant.affine import Scheme
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.head import first_tokens
from megatron_lowbit.quant.round_to_nearest import quantize_model
from megatron_lowbit.quant.tp_sizes import default_shard_groups, widths_of
from megatron_lowbit.quant.weight_bits import Allocation
from megatron_lowbit.runtime.distributed import PreemptionCheck, group_rank, on_rank_zero, world_size
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger, progress


def take_checkpoints(
    given: LowBitCheckpoint | None,
    model: nn.Module,
    weights: Sequence[WeightsConfig],
    dtype: torch.dtype | None,
    seed: int,
) -> dict[str, LowBitCheckpoint]:
    """Return {scheme: checkpoint}: the artifact's, or the model rounded as `weights` say. seed: of a rotation."""
    if given is not None:
        return {given.scheme_name: given}
    made: dict[str, LowBitCheckpoint] = {
        w.scheme: round_weights(model, w, dtype, seed) for w in weights if w.scheme != "none"
    }
    if made:
        tell_full_precision(model, weights[0].experts)
        if weights[0].shard_groups is None:
            tell_shard_groups(next(iter(made.values())).shard_groups)
    return made


def round_weights(
    model: nn.Module,
    weights: WeightsConfig,
    dtype: torch.dtype | None,
    seed: int = 0,
    allocation: Allocation | None = None,
) -> LowBitCheckpoint:
    """Round an unsharded, unpatched model to nearest; what is not quantized is stored as `dtype`. seed: of a rotation,
    which needs a copy of the model. allocation: of scheme auto."""
    require_experts(model, weights)
    fingerprint, rotation = huggingface.fingerprint(model), None
    wanted = Scheme.parse(weights.scheme).act_bits if weights.attention else 16
    bits = attention.possible_bits(model, huggingface.find_linears(model), wanted)
    if weights.rotation == "learned":
        raise LowBitError(
            "weights.rotation=learned needs weights.method=qllm: make an artifact with quantize, then pass artifact"
        )
    if weights.rotation != "none":
        model = copy.deepcopy(model)
        widths = widths_of(linear for _, linear in huggingface.find_linears(model).values())
        groups = weights.shard_groups or default_shard_groups(huggingface.model_config(model), widths)
        rotation = rotate_model(model, seed, groups, bits)
    linears = {name: linear for name, (_, linear) in huggingface.find_linears(model).items()}
    checkpoint = quantize_model(model, linears, weights, fingerprint, dtype, allocation)
    checkpoint = replace(checkpoint, attention_bits=bits, rotation=rotation)
    return checkpoint if weights.experts == "none" else attach_experts(model, checkpoint, weights)


def check_head(config: Any) -> None:
    """Raise LowBitError where weights.lm_head_bits cannot be made here, before a model is loaded: its KL divergence is
    measured on text and on the whole model."""
    bits = config.weights.lm_head_bits
    if not bits:
        return
    if config.artifact is not None and (Path(config.artifact) / "lowbit.json").exists():
        raise LowBitError(f"weights.lm_head_bits={bits} would have no effect: the artifact decides it; leave it out")
    if config.weights.scheme == "none":
        raise LowBitError(f"weights.lm_head_bits={bits} would have no effect: it needs a weights.scheme")
    if config.engine != "huggingface":
        raise LowBitError(
            f"weights.lm_head_bits={bits} is measured on the whole model, which engine={config.engine} splits: make an "
            "artifact with quantize engine=huggingface, then pass artifact"
        )
    if config.weights.rotation != "none":
        raise LowBitError(
            f"weights.lm_head_bits={bits} of a rotated model needs weights.method=qllm: make an artifact "
            "with quantize, then pass artifact"
        )
    if config.calibration.data is None:
        raise LowBitError(
            f"weights.lm_head_bits={bits} is measured on text, by its KL divergence; set calibration.data"
        )


def with_head(
    engine: Engine, checkpoint: LowBitCheckpoint, bits: int, windows: Windows, logger: MetricLogger
) -> LowBitCheckpoint:
    """Return the checkpoint with its output projection in `bits` bits. The engine is unpatched."""
    checkpoint = quantize_head(engine.module, checkpoint, bits, first_tokens(windows.ids, windows.mask))
    assert checkpoint.head is not None
    logger.log(lm_head_kl=checkpoint.head.kl, lm_head_tokens=checkpoint.head.tokens)
    return checkpoint


def load_windows(engine: Engine, section: Any, key: str, logger: MetricLogger) -> Windows:
    """Return the section's token windows, read and tokenized by rank 0, which also says what it has read."""
    if section.data is None:
        raise LowBitError(no_data(key))
    check_tokenizer(engine.tokenizer)
    arguments = (section.data, section.samples, section.sequence_length, engine.context, key, section.text_column)
    tell = partial(logger.read, key)
    return Windows(**on_rank_zero(lambda: vars(token_windows(engine.tokenizer, *arguments, tell=tell))))


def calibrate_engine(
    engine: Engine,
    section: Any,
    tp_sizes: list[int],
    logger: MetricLogger,
    comm: CommConfig,
    sites: Mapping[str, Any] | None = None,
    resumed: CalibrateConfig | None = None,
    windows: Windows | None = None,
) -> CalibrationStats:
    """Run the unpatched engine once over calibration.data; with comm.gather also record what column-parallel
    linears read. sites: other than the engine's own. resumed: the config of a pass whose state is kept in its
    output_dir, and continued from there; without, a pass that is told to stop starts over. windows: of
    calibration.data, where they have been read."""
    refuse_rotated(engine)
    windows = load_windows(engine, section, "calibration", logger) if windows is None else windows
    count, fingerprint = windows.num_batches(section.batch_size), engine.fingerprint()
    lag, state = world_size(engine.pp_group) - 1, None
    if resumed is not None:
        named = {"calibration.data's tokens": windows.digest(), "model's weights": str(digest([fingerprint]))}
        state = PassState(resumed, named, count, lag)
    done = 0 if state is None else state.done

    def logged():
        rest = islice(windows.batches(section.batch_size), done, None)
        batches = rest if state is not None else PreemptionCheck(lag=lag).each(rest)
        for number, (ids, mask) in enumerate(progress(batches, count - done, "calibrating", env_rank()), done):
            yield share_of_batch(ids, mask, engine.dp_group)
            logger.log(calibration_batch=number + 1, calibration_tokens=int(mask.sum()))

    run_blocks = partial(engine, logits_to_keep=1)  # logits of every token would be computed for nobody
    return calibrate(
        run_blocks,
        sites or engine.sites(),
        logged(),
        tp_sizes,
        fingerprint,
        section.ema_gamma,
        histograms=comm.clipping == "histogram",
        inputs=engine.inputs() if comm.gather else None,
        groups=ParallelGroups(engine.group, engine.dp_group, engine.pp_group),
        state=state,
    )


def refuse_rotated(engine: Engine) -> None:
    """Raise LowBitError where the engine's model is to be rotated: ranges of it as it is would be of other sums."""
    if engine.checkpoint is not None and engine.checkpoint.rotation is not None:
        raise LowBitError(
            "ranges are measured on the model as it is, but the artifact's is rotated: have quantize make the artifact "
            "and its plans in one run of weights.method=qllm, or leave the low-bit communication out"
        )


def share_of_batch(
    ids: torch.Tensor, mask: torch.Tensor, dp_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this data-parallel rank's neighbouring windows; where they do not divide, the last get padding."""
    size, rank = world_size(dp_group), group_rank(dp_group)
    missing = -len(ids) % size
    if missing:
        ids, mask = (torch.cat([t, t.new_zeros(missing, t.shape[1])]) for t in (ids, mask))
    return ids.chunk(size)[rank], mask.chunk(size)[rank]


def prepare_artifact(engine: Engine, config: Any, logger: MetricLogger) -> Artifact:
    """Return what evaluate and generate apply: the given artifact, or one made here from weights.* and comm.*.

    Raises LowBitError for a setting that the artifact, or the layout, would leave without effect.
    """
    comm: CommConfig = config.comm
    plans = engine.plans
    scheme = engine.checkpoint.scheme_name if engine.checkpoint else "none"
    if config.weights.scheme not in ("none", scheme):
        raise LowBitError(
            f"artifact {config.artifact!r} holds {scheme} weights, not weights.scheme={config.weights.scheme}"
        )
    for key in ("group_size", "symmetric", "zero_point", "clipping", "rounding", "shard_groups", "rotation", "experts"):
        value = getattr(config.weights, key)
        if value != getattr(WeightsConfig(), key) and config.weights.scheme == "none":
            why = "the artifact decides it" if engine.checkpoint else "it needs a weights.scheme"
            raise LowBitError(f"weights.{key}={value} would have no effect: {why}")
    low_bit = is_low_bit(comm.mode)
    if low_bit and engine.tp_size == 1:
        raise LowBitError(
            f"comm.mode={comm.mode} has nobody to talk to at tp=1; set tp (engine=deepspeed) or virtual_tp"
        )
    usual = CommConfig()
    given = [key for key in PLAN_KEYS if getattr(comm, key) != getattr(usual, key)]
    if given and (engine.tp_size in plans or not low_bit):
        key = given[0]
        why = "the artifact's plan decides it" if engine.tp_size in plans else "it needs comm.mode=one_shot"
        raise LowBitError(f"comm.{key}={getattr(comm, key)} would have no effect: {why}")
    if low_bit and engine.tp_size not in plans:
        if not engine.full_precision:
            raise LowBitError(
                f"artifact {config.artifact!r} has no plan for tp={engine.tp_size}; set model to calibrate one"
            )
        stats = calibrate_engine(engine, config.calibration, [engine.tp_size], logger, comm)
        plans = {engine.tp_size: build_plan(stats, engine.tp_size, comm, config.seed)}
    checkpoint = engine.checkpoint
    if checkpoint is not None and config.weights.lm_head_bits:
        windows = load_windows(engine, config.calibration, "calibration", logger)
        checkpoint = with_head(engine, checkpoint, config.weights.lm_head_bits, windows, logger)
    artifact = Artifact(checkpoint, plans)
    patching.choose_plan(artifact, engine.tp_size, comm.mode)  # a missing plan is told now, not after an evaluation
    return artifact


def apply_prepared(engine: Engine, artifact: Artifact, comm: CommConfig) -> None:
    """Apply what prepare_artifact returned, if there is anything to apply."""
    if artifact.checkpoint is not None or artifact.plans or (engine.tp_size > 1 and comm.mode is not None):
        engine.apply(artifact, comm)
