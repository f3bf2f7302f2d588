"""A loaded model on its engine: one object that the stages calibrate, patch and run."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import distributed as dist
from torch import nn

from megatron_lowbit.adapters import patching
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.adapters.huggingface.outliers import inject_outliers
from megatron_lowbit.artifact import Artifact, CalibrationStats, CommPlan, Fingerprint, LowBitCheckpoint
from megatron_lowbit.comm.agreement import digest
from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.comm.observers import calibrate
from megatron_lowbit.comm.reducers import LOW_BIT
from megatron_lowbit.config import (
    CalibrateConfig,
    CommConfig,
    CommMode,
    LowBitError,
    StageConfig,
    WeightsConfig,
    one_line,
)
from megatron_lowbit.io.data import Windows, token_windows
from megatron_lowbit.io.hf_names import ModelWeights, lacking, prefix_mapping, untie, unties
from megatron_lowbit.io.hf_weights import HFWeights, check_safetensors
from megatron_lowbit.launch.full_precision import tell_full_precision
from megatron_lowbit.launch.generation import load_generation_config
from megatron_lowbit.launch.inputs import model_name, no_data
from megatron_lowbit.launch.model_folder import check_config, download
from megatron_lowbit.launch.tokenizer import check_tokenizer, load_tokenizer
from megatron_lowbit.qllm.block_source import skeleton, stored_buffers
from megatron_lowbit.qllm.resume import PassState
from megatron_lowbit.quant.round_to_nearest import quantize_model
from megatron_lowbit.runtime.distributed import (
    Watch,
    device,
    env_rank,
    group_rank,
    launched,
    on_rank_zero,
    seed_everything,
    world_size,
)
from megatron_lowbit.runtime.metrics import MetricLogger, progress
from megatron_lowbit.runtime.rendezvous import join


@dataclass
class Engine:
    """A Hugging Face model in one process, and what the other engines share. `model` is what the adapter patches."""

    model: Any
    tokenizer: Any
    hf_config: Any
    context: int
    tp_size: int  # ranks that share the model, real or virtual
    checkpoints: dict[str, LowBitCheckpoint]  # {scheme: ...}: the artifact's, or what the stage asked to quantize
    plans: dict[int, CommPlan]  # the artifact's
    full_precision: bool  # whether the model itself has full-precision weights

    @property
    def module(self) -> nn.Module:
        return self.model

    @property
    def text_config(self) -> Any:
        return getattr(self.hf_config, "text_config", None) or self.hf_config

    @property
    def checkpoint(self) -> LowBitCheckpoint | None:
        return next(iter(self.checkpoints.values()), None)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The tensor-parallel group; None for a single rank."""
        return None

    dp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: int = 0) -> Any:
        """An object with logits [windows, length, vocab], on every rank; logits_to_keep=1: where nobody reads them."""
        keep = {"logits_to_keep": logits_to_keep} if logits_to_keep else {}  # a few families do not know it
        return self.module(input_ids=input_ids.to(device()), use_cache=False, **keep)

    def sites(self) -> Mapping[str, Any]:
        """{fqn: row-parallel linear} of the unpatched model, as calibrate wants them."""
        return huggingface.row_parallel_sites(self.model)

    def inputs(self) -> Mapping[str, Any]:
        """{fqn: column-parallel linear}, the first of each group that reads the same tensor."""
        return huggingface.first_readers(huggingface.find_linears(self.model))

    def site_pairs(self) -> dict[str, tuple[Any, Any]]:
        """{fqn: (low-bit row-parallel linear that is in place, what it replaced)}."""
        return patching.site_pairs(self.model)

    def all_stages(self, sites: dict[str, float]) -> dict[str, float]:
        """What all pipeline stages have measured of their own sites."""
        return sites

    def site_names(self) -> Mapping[str, str]:
        """{a low-bit linear's name in the model: its Hugging Face name}, where they differ."""
        return {}

    def fingerprint(self) -> Fingerprint:
        return huggingface.fingerprint(self.module)

    def apply(self, artifact: Artifact, comm_mode: CommMode | CommConfig | None = None) -> None:
        huggingface.apply_to_huggingface(self.model, artifact, self.tp_size, comm_mode)

    def remove(self) -> None:
        patching.remove(self.model)

    def generate(self, prompts: Sequence[list[int]], options: GenerateOptions) -> list[list[int]]:
        """The new tokens of every prompt, one after the other; the same on all ranks."""
        made = []
        for number, prompt in enumerate(prompts):
            stream = partial(options.on_token, number)
            sampling = (
                {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
            )
            ids = torch.tensor([prompt], device=device())
            output: Any = self.module.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(options.max_new_tokens, self.context - len(prompt)),
                pad_token_id=self.tokenizer.eos_token_id,
                streamer=_TokenStreamer(stream, options.on_step),
                **sampling,
            )
            made.append(output[0, len(prompt) :].tolist())
        return made


class _TokenStreamer:
    """What transformers' generate calls with the prompt, then with every token."""

    def __init__(self, on_token: Callable[[int], None], on_step: Callable[[], None]):
        self.on_token, self.on_step, self.begun = on_token, on_step, False

    def put(self, ids: torch.Tensor) -> None:
        self.on_step()
        if self.begun:
            self.on_token(int(ids))
        self.begun = True

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class GenerateOptions:
    """How to continue prompts. on_token(number of the prompt, token id) is called as tokens come; on_step() at every
    decoding step, by all ranks equally often (not all pipeline stages see the tokens)."""

    max_new_tokens: int
    temperature: float = 0.0
    batching: Literal["static", "dynamic"] = "dynamic"
    max_batch: int = 8
    seed: int = 0
    on_token: Callable[[int, int], None] = lambda number, token: None
    on_step: Callable[[], None] = lambda: None


@dataclass
class DeepSpeedEngine(Engine):
    """`model` is DeepSpeed's InferenceEngine."""

    @property
    def module(self) -> nn.Module:
        return self.model.module

    @property
    def group(self) -> dist.ProcessGroup | None:
        from megatron_lowbit.adapters import deepspeed

        return deepspeed.tp_group(self.model)

    def sites(self) -> Mapping[str, Any]:
        from megatron_lowbit.adapters import deepspeed

        return deepspeed.row_parallel_sites(self.model)

    def inputs(self) -> Mapping[str, Any]:
        from megatron_lowbit.adapters import deepspeed

        if self.group is None:
            return huggingface.first_readers(huggingface.find_linears(self.module))
        return huggingface.first_readers(
            {name: ("column", m) for name, m in deepspeed.tp_linears(self.model)[0].items()}
        )

    def fingerprint(self) -> Fingerprint:
        from megatron_lowbit.adapters import deepspeed

        return huggingface.fingerprint(self.module) if self.group is None else deepspeed.fingerprint(self.model)

    def apply(self, artifact: Artifact, comm_mode: CommMode | CommConfig | None = None) -> None:
        from megatron_lowbit.adapters import deepspeed

        deepspeed.apply_to_deepspeed(self.model, artifact, comm_mode)


def start_engine(config: StageConfig, weights: Sequence[WeightsConfig] = ()) -> Engine:
    """Load the model and tokenizer, take the artifact's checkpoint or quantize as `weights` say, start the engine.

    Quantization comes before the engine, which would shard the full-precision weights.
    """
    seed_everything(config.seed)
    if config.engine == "megatron":
        from megatron_lowbit.launch.engines.megatron import start_megatron

        return start_megatron(config, weights)
    world = _init_deepspeed() if config.engine == "deepspeed" else 1
    folder = Artifact.load(config.artifact) if config.artifact is not None else Artifact()
    hf_config, tokenizer = load_config_and_tokenizer(config, folder.checkpoint)
    model = load_model(config, hf_config, folder.checkpoint)
    text_config = huggingface.model_config(model)
    tp_size = max(config.tp, config.virtual_tp)
    huggingface.check_divides(text_config, tp_size, "virtual_tp" if config.virtual_tp > 1 else "tp")
    checkpoints = take_checkpoints(folder.checkpoint, model, weights, hf_config.dtype)
    context = getattr(text_config, "max_position_embeddings", None) or 2048
    full_precision = not hasattr(model, "_lowbit_fingerprint")
    shared = (tokenizer, hf_config, context, tp_size, checkpoints, folder.plans, full_precision)
    if config.engine == "huggingface":
        return Engine(model.eval().to(device()), *shared)
    # DeepSpeed moves each rank's shards; the whole model may not fit
    from megatron_lowbit.adapters import deepspeed

    return DeepSpeedEngine(deepspeed.init_engine(model.eval(), world, next(model.parameters()).dtype), *shared)


def take_checkpoints(
    given: LowBitCheckpoint | None, model: nn.Module, weights: Sequence[WeightsConfig], dtype: torch.dtype | None
) -> dict[str, LowBitCheckpoint]:
    """{scheme: checkpoint}: the artifact's, or the model rounded as `weights` say."""
    if given is not None:
        return {given.scheme_name: given}
    made: dict[str, LowBitCheckpoint] = {
        w.scheme: round_weights(model, w, dtype) for w in weights if w.scheme != "none"
    }
    if made:
        tell_full_precision(model)
    return made


def round_weights(model: nn.Module, weights: WeightsConfig, dtype: torch.dtype | None) -> LowBitCheckpoint:
    """Round-to-nearest checkpoint of an unsharded, unpatched model; what is not quantized is stored as `dtype`."""
    linears = {name: linear for name, (_, linear) in huggingface.find_linears(model).items()}
    checkpoint = quantize_model(model, linears, weights, huggingface.fingerprint(model), dtype)
    return replace(checkpoint, attention_bits=attention.possible_bits(model, linears, checkpoint.attention_bits))


def load_windows(engine: Engine, section: Any, key: str, logger: MetricLogger) -> Windows:
    """The section's token windows, read and tokenized by rank 0, which also says what it has read."""
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
) -> CalibrationStats:
    """One calibration pass of the unpatched engine over calibration.data; with comm.gather also of what column-parallel
    linears read. sites: other than the engine's own. resumed: the config of a pass whose state is kept in its
    output_dir, and continued from there; without, a pass that is told to stop starts over."""
    windows = load_windows(engine, section, "calibration", logger)
    count, fingerprint = windows.num_batches(section.batch_size), engine.fingerprint()
    lag, state = world_size(engine.pp_group) - 1, None
    if resumed is not None:
        named = {"calibration.data's tokens": windows.digest(), "model's weights": str(digest([fingerprint]))}
        state = PassState(resumed, named, count, lag)
    done = 0 if state is None else state.done

    def logged():
        rest = islice(windows.batches(section.batch_size), done, None)
        batches = rest if state is not None else Watch(lag=lag).each(rest)
        for number, (ids, mask) in enumerate(progress(batches, count - done, "calibrating", env_rank()), done):
            yield share_of_batch(ids, mask, engine.dp_group)
            logger.log(calibration_batch=number + 1, calibration_tokens=int(mask.sum()))

    run_blocks = partial(engine, logits_to_keep=1)  # logits of every token would be computed for nobody
    inputs = engine.inputs() if comm.gather else None
    groups = (engine.dp_group, engine.pp_group)
    arguments = (fingerprint, section.ema_gamma, engine.group, inputs, *groups, comm.clipping == "histogram")
    return calibrate(run_blocks, sites or engine.sites(), logged(), tp_sizes, *arguments, state=state)


def share_of_batch(
    ids: torch.Tensor, mask: torch.Tensor, dp_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """This data-parallel rank's neighbouring windows of a batch; where they do not divide, the last get padding."""
    size, rank = world_size(dp_group), group_rank(dp_group)
    missing = -len(ids) % size
    if missing:
        ids, mask = (torch.cat([t, t.new_zeros(missing, t.shape[1])]) for t in (ids, mask))
    return ids.chunk(size)[rank], mask.chunk(size)[rank]


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
    low_bit = comm.mode in LOW_BIT
    if low_bit and engine.tp_size == 1:
        raise LowBitError(
            f"comm.mode={comm.mode} has nobody to talk to at tp=1; set tp (engine=deepspeed) or virtual_tp"
        )
    defaults = CommConfig()
    keys = (
        "preset",
        "bits",
        "bf16_fraction",
        "selection",
        "symmetric",
        "scale",
        "allocation",
        "clipping",
        "second_bits",
        "carrier_bits",
    )
    given = [key for key in keys if getattr(comm, key) != getattr(defaults, key)]
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
    artifact = Artifact(engine.checkpoint, plans)
    patching.choose_plan(artifact, engine.tp_size, comm.mode)  # a missing plan is told now, not after an evaluation
    return artifact


def _init_deepspeed() -> int:
    """Join the ranks that the launcher started; returns how many there are."""
    from megatron_lowbit.adapters import deepspeed

    package = deepspeed.import_deepspeed()
    assert launched(), "run_stage starts ranks for engine=deepspeed"
    join()
    package.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return dist.get_world_size()


def compute_dtype(config: StageConfig) -> torch.dtype:
    auto = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype, auto)


def load_config_and_tokenizer(config: StageConfig, checkpoint: LowBitCheckpoint | None) -> tuple[Any, Any]:
    """(config, tokenizer) of the model or, without one, of the artifact. Raises LowBitError for what is wrong there."""
    import transformers
    from transformers import AutoConfig

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if config.model is None and (checkpoint is None or config.artifact is None):
        raise LowBitError("model is not set; name a folder, a hub id or `embedded`")
    name = model_name(config.model or config.artifact or "")
    with _loading(name):
        hf_config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        check_config(hf_config, name)
        return hf_config, load_tokenizer(name)


def load_model(config: StageConfig, hf_config: Any, checkpoint: LowBitCheckpoint | None) -> Any:
    """The whole Hugging Face model, with the outliers that config asks for; from the artifact without config.model."""
    name, dtype = model_name(config.model or config.artifact or ""), compute_dtype(config)
    with _loading(name):
        if config.model is None and checkpoint is not None:
            model = _from_checkpoint(hf_config, checkpoint, dtype)
            model.generation_config = load_generation_config(name) or model.generation_config
            return model
        model = _from_folder(download(name), dtype)
    if config.inject_outliers is not None:
        inject_outliers(model, config.inject_outliers, config.inject_at, config.seed)
    return model


def _from_folder(folder: str, dtype: torch.dtype) -> Any:
    """The model that a folder holds, whatever stands before all names of its weights."""
    from transformers import AutoModelForCausalLM

    check_safetensors(folder)
    options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}  # no code of the model's own
    load = partial(AutoModelForCausalLM.from_pretrained, folder, output_loading_info=True, **options)
    stored: Any = load()
    model, info = stored
    if info["missing_keys"]:
        mapping = prefix_mapping(model, HFWeights(folder).files)
        if mapping:
            stored = load(key_mapping=mapping)
            model, info = stored
    if info["missing_keys"]:
        raise LowBitError(lacking(folder, info["missing_keys"], info["unexpected_keys"], model))
    ModelWeights(folder, model).check_dtypes(f"{name}.weight" for name in huggingface.find_linears(model))
    return model


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Whatever transformers, safetensors, tokenizers and the hub client raise, as one line; what they print, not."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            yield
    except LowBitError:
        raise
    except Exception as error:
        raise LowBitError(f"cannot load model {name!r}: {one_line(error)}") from None


def _from_checkpoint(hf_config: Any, checkpoint: LowBitCheckpoint, dtype: torch.dtype) -> Any:
    """A model without full-precision linears: zeros that take no memory stand for them until they are swapped.

    (An engine that shards the model copies its share of those zeros; the swap frees them again.)
    """
    model = skeleton(hf_config, dtype)
    if unties(model, checkpoint.tensors, checkpoint.tensors.__getitem__):
        untie(hf_config)
        model = skeleton(hf_config, dtype)
    placeholder = torch.zeros(1, 1, dtype=dtype)
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in checkpoint.tensors.items()}
    for name in checkpoint.linears:
        shape = model.get_submodule(name).weight.shape
        state[f"{name}.weight"] = placeholder.expand(shape)
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    lacks = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    lacks += [name for name, _ in stored_buffers(model) if name not in state]
    if lacks or unexpected:
        raise LowBitError(
            f"the artifact lacks {(lacks or unexpected)[0]} of the model in its config.json; write it again"
        )
    model._lowbit_fingerprint = checkpoint.fingerprint
    return model
