"""A loaded model on its engine: one object that the stages calibrate, patch and run."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from megatron_lowbit.adapters import huggingface, patching
from megatron_lowbit.adapters.blocks import skeleton
from megatron_lowbit.adapters.outliers import inject_outliers
from megatron_lowbit.artifacts import Artifact, CalibrationStats, CommPlan, Fingerprint, LowBitCheckpoint
from megatron_lowbit.calibrate import calibrate
from megatron_lowbit.config import CommConfig, CommMode, LowBitError, StageConfig, WeightsConfig, one_line
from megatron_lowbit.data import Windows, token_windows
from megatron_lowbit.distributed import device, env_rank, launched, on_rank_zero, seed_everything
from megatron_lowbit.metrics import MetricLogger, progress
from megatron_lowbit.ranges import build_plan
from megatron_lowbit.rounding import quantize_model


@dataclass
class Engine:
    """kind "huggingface": `model` is the Hugging Face model; "deepspeed": the InferenceEngine around it."""

    kind: str
    model: Any
    tokenizer: Any
    context: int
    tp_size: int  # ranks that share the model, real or virtual
    checkpoints: dict[str, LowBitCheckpoint]  # {scheme: ...}: the artifact's, or what the stage asked to quantize
    plans: dict[int, CommPlan]  # the artifact's
    full_precision: bool  # whether the model itself has full-precision weights

    @property
    def module(self) -> nn.Module:
        return self.model.module if self.kind == "deepspeed" else self.model

    @property
    def checkpoint(self) -> LowBitCheckpoint | None:
        return next(iter(self.checkpoints.values()), None)

    @property
    def group(self) -> dist.ProcessGroup | None:
        if self.kind == "huggingface":
            return None
        from megatron_lowbit.adapters import deepspeed

        return deepspeed.tp_group(self.model)

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> Any:
        return self.module(input_ids=input_ids.to(device()), use_cache=False, **options)

    def sites(self) -> dict[str, nn.Module]:
        """{fqn: row-parallel linear} of the unpatched model."""
        if self.kind == "huggingface":
            return huggingface.row_parallel_sites(self.model)
        from megatron_lowbit.adapters import deepspeed

        return deepspeed.row_parallel_sites(self.model)

    def fingerprint(self) -> Fingerprint:
        if self.group is None:
            return huggingface.fingerprint(self.module)
        from megatron_lowbit.adapters import deepspeed

        return deepspeed.fingerprint(self.model)

    def apply(self, artifact: Artifact, comm_mode: CommMode | None = None) -> None:
        if self.kind == "huggingface":
            huggingface.apply_to_huggingface(self.model, artifact, self.tp_size, comm_mode)
        else:
            from megatron_lowbit.adapters import deepspeed

            deepspeed.apply_to_deepspeed(self.model, artifact, comm_mode)

    def remove(self) -> None:
        patching.remove(self.model)


def start_engine(config: StageConfig, weights: Sequence[WeightsConfig] = ()) -> Engine:
    """Load the model and tokenizer, take the artifact's checkpoint or quantize as `weights` say, start the engine.

    Quantization comes before the engine, which would shard the full-precision weights.
    """
    seed_everything(config.seed)
    world = _init_distributed(config)
    folder = Artifact.load(config.artifact) if config.artifact is not None else Artifact()
    model, tokenizer, stored_dtype = _load(config, folder.checkpoint)
    if config.inject_outliers is not None and config.model is not None:
        inject_outliers(model, config.inject_outliers, config.inject_at, config.seed)
    tp_size = max(config.tp, config.virtual_tp)
    text_config = huggingface.model_config(model)
    huggingface.check_divides(text_config, tp_size, "virtual_tp" if config.virtual_tp > 1 else "tp")
    if folder.checkpoint is not None:
        checkpoints = {folder.checkpoint.scheme_name: folder.checkpoint}
    else:
        checkpoints = {w.scheme: round_weights(model, w, stored_dtype) for w in weights if w.scheme != "none"}
    context = getattr(text_config, "max_position_embeddings", None) or 2048
    full_precision = not hasattr(model, "_lowbit_fingerprint")
    model.eval()
    if config.engine == "huggingface":
        model.to(device())
    else:  # DeepSpeed moves each rank's shards; the whole model may not fit
        from megatron_lowbit.adapters import deepspeed

        model = deepspeed.init_engine(model, world, next(model.parameters()).dtype)
    return Engine(config.engine, model, tokenizer, context, tp_size, checkpoints, folder.plans, full_precision)


def round_weights(model: nn.Module, weights: WeightsConfig, dtype: torch.dtype | None) -> LowBitCheckpoint:
    """Round-to-nearest checkpoint of an unsharded, unpatched model; what is not quantized is stored as `dtype`."""
    linears = {name: linear for name, (_, linear) in huggingface.find_linears(model).items()}
    return quantize_model(model, linears, weights, huggingface.fingerprint(model), dtype)


def load_windows(engine: Engine, section: Any, key: str) -> Windows:
    """The section's token windows, read and tokenized by rank 0."""
    if section.data is None:
        raise LowBitError(
            f"{key}.data is not set; name a text file, a hub dataset or "
            f"stdlib:{key.replace('evaluation', 'validation')}"
        )
    arguments = (section.data, section.samples, section.sequence_length, engine.context, key)
    return on_rank_zero(lambda: token_windows(engine.tokenizer, *arguments))


def calibrate_engine(engine: Engine, section: Any, tp_sizes: list[int], logger: MetricLogger) -> CalibrationStats:
    """One calibration pass of the unpatched engine over calibration.data."""
    windows = load_windows(engine, section, "calibration")

    def logged():
        batches = windows.batches(section.batch_size)
        count = windows.num_batches(section.batch_size)
        for number, (ids, mask) in enumerate(progress(batches, count, "calibrating", env_rank())):
            yield ids, mask
            logger.log(calibration_batch=number + 1, calibration_tokens=int(mask.sum()))

    run_blocks = partial(engine, logits_to_keep=1)  # logits of every token would be computed for nobody
    return calibrate(
        run_blocks, engine.sites(), logged(), tp_sizes, engine.fingerprint(), section.ema_gamma, engine.group
    )


def prepare_artifact(engine: Engine, config: Any, logger: MetricLogger) -> Artifact:
    """What evaluate and generate apply: the given artifact, or one made here from weights.* and comm.*.

    Raises LowBitError for a setting that the artifact, or the layout, would leave without effect.
    """
    comm: CommConfig = config.comm
    plans = engine.plans
    scheme = engine.checkpoint.scheme_name if engine.checkpoint else "none"
    if config.weights.scheme not in ("none", scheme):
        raise LowBitError(
            f"artifact {config.artifact!r} holds {scheme} weights, not weights.scheme={config.weights.scheme}"
        )
    for key in ("group_size", "symmetric", "shard_groups"):
        value = getattr(config.weights, key)
        if value != getattr(WeightsConfig(), key) and config.weights.scheme == "none":
            why = "the artifact decides it" if engine.checkpoint else "it needs a weights.scheme"
            raise LowBitError(f"weights.{key}={value} would have no effect: {why}")
    if comm.mode == "one_shot" and engine.tp_size == 1:
        raise LowBitError("comm.mode=one_shot has nobody to talk to at tp=1; set tp (engine=deepspeed) or virtual_tp")
    defaults = CommConfig()
    keys = ("bits", "bf16_fraction", "selection", "symmetric")
    given = [key for key in keys if getattr(comm, key) != getattr(defaults, key)]
    if given and (engine.tp_size in plans or comm.mode != "one_shot"):
        key = given[0]
        why = "the artifact's plan decides it" if engine.tp_size in plans else "it needs comm.mode=one_shot"
        raise LowBitError(f"comm.{key}={getattr(comm, key)} would have no effect: {why}")
    if comm.mode == "one_shot" and engine.tp_size not in plans:
        if not engine.full_precision:
            raise LowBitError(
                f"artifact {config.artifact!r} has no plan for tp={engine.tp_size}; set model to calibrate one"
            )
        stats = calibrate_engine(engine, config.calibration, [engine.tp_size], logger)
        plans = {engine.tp_size: build_plan(stats, engine.tp_size, comm, config.seed)}
    artifact = Artifact(engine.checkpoint, plans)
    patching.choose_plan(artifact, engine.tp_size, comm.mode)  # a missing plan is told now, not after an evaluation
    return artifact


def _init_distributed(config: StageConfig) -> int:
    """Join the ranks that the launcher started; returns how many there are."""
    if config.engine == "huggingface":
        return 1
    from megatron_lowbit.adapters import deepspeed

    package = deepspeed.import_deepspeed()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    assert launched(), "run_stage starts ranks for engine=deepspeed"
    package.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(minutes=30))
    return dist.get_world_size()


def model_name(name: str) -> str:
    """The folder or hub id that `model` names. Raises LowBitError for a folder that is not there or holds no model."""
    if name == "embedded":
        from megatron_lowbit import embedded

        return str(Path(embedded.__file__).parent)
    path = Path(name)
    if not path.is_dir() and (
        path.is_absolute() or name.startswith((".", "~")) or (name.count("/") != 1 and "/" in name)
    ):
        raise LowBitError(f"model folder {name!r} does not exist")
    if path.is_dir() and not (path / "config.json").exists():
        raise LowBitError(f"{name!r} holds no config.json; it is not a Hugging Face model folder")
    return name


def compute_dtype(config: StageConfig) -> torch.dtype:
    auto = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype, auto)


def _load(config: StageConfig, checkpoint: LowBitCheckpoint | None) -> tuple[Any, Any, torch.dtype | None]:
    """(model, tokenizer, dtype of the stored weights). Raises LowBitError for whatever is wrong with the folder."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if config.model is None and (checkpoint is None or config.artifact is None):
        raise LowBitError("model is not set; name a folder, a hub id or `embedded`")
    name = model_name(config.model or config.artifact or "")
    dtype = compute_dtype(config)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            hf_config = AutoConfig.from_pretrained(name)
            if not any("CausalLM" in a or "LMHead" in a for a in hf_config.architectures or ["CausalLM"]):
                raise LowBitError(f"{name!r} is a {hf_config.architectures[0]}, not a causal LM")
            stored_dtype = hf_config.dtype
            tokenizer = AutoTokenizer.from_pretrained(name)
            if config.model is None and checkpoint is not None:
                model = _from_checkpoint(hf_config, checkpoint, dtype)
            else:
                loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
                model, info = loaded
                if info["missing_keys"]:
                    missing = sorted(info["missing_keys"])
                    raise LowBitError(
                        f"{name!r} lacks {len(missing)} weights, the first {missing[0]}; download it again"
                    )
    except LowBitError:
        raise
    except Exception as error:  # whatever transformers, safetensors, tokenizers and the hub client raise
        raise LowBitError(f"cannot load model {name!r}: {one_line(error)}") from None
    return model, tokenizer, stored_dtype


def _from_checkpoint(hf_config: Any, checkpoint: LowBitCheckpoint, dtype: torch.dtype) -> Any:
    """A model without full-precision linears: zeros that take no memory stand for them until they are swapped.

    (An engine that shards the model copies its share of those zeros; the swap frees them again.)
    """
    model = skeleton(hf_config, dtype)
    placeholder = torch.zeros(1, 1, dtype=dtype)
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in checkpoint.tensors.items()}
    for name in checkpoint.linears:
        shape = model.get_submodule(name).weight.shape
        state[f"{name}.weight"] = placeholder.expand(shape)
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    lacking = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lacking or unexpected:
        raise LowBitError(
            f"the artifact lacks {(lacking or unexpected)[0]} of the model in its config.json; write it again"
        )
    model._lowbit_fingerprint = checkpoint.fingerprint
    return model
