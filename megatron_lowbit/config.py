"""Configuration: one frozen model per stage, from a YAML file and dotted overrides.

    load_config(EvaluateConfig, "run.yaml", ["comm.bits=4", "tp=2"])

Unknown keys and values out of range are errors that name the key, the value and the nearest valid name. A comment under
each field says what it does; these comments are the reference of every command's options.
"""

from __future__ import annotations

import difflib
import os
import reprlib
from functools import cache
from typing import Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from megatron_lowbit.plain_yaml import DEEPEST, LONGEST, parse_yaml

SchemeName = Literal["none", "W4A16", "W4A8", "W4A4", "W6A6", "W8A8"]
EngineName = Literal["huggingface", "deepspeed", "megatron"]
CommMode = Literal["native", "bf16", "one_shot", "two_shot", "exact_sum", "auto"]


class LowBitError(Exception):
    """Bad input: one line that names the value and the fix. Commands print it and exit with code 2."""


def check_mode(name: str, mode: Any) -> None:
    """Raise LowBitError where `mode` is neither None nor a CommMode; name: of the argument."""
    modes = get_args(CommMode)
    if mode is not None and mode not in modes:
        near = _nearest(str(mode), list(modes))
        hint = f"; did you mean {near!r}?" if near else ""
        raise LowBitError(f"{name}={shown(mode)} is not one of {', '.join(modes)}{hint}")


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise LowBitError(_explain(type(self), error)) from None

    # Sections inside a config are validated as part of it, so that messages name the whole key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class CalibrationConfig(_Config):
    data: str | None = None
    """text that the ranges are measured on: hub id[:config[:split]], a text file, records (.json, .jsonl, .csv,
    .tsv, .parquet), each also .gz or .zst, a folder of datasets.save_to_disk, or stdlib:calibration"""
    text_column: str | None = None
    """column of records to read; none: one that is named text, content, ..., or the longest; conversations by the
    tokenizer's chat template"""
    samples: int = Field(128, ge=1)
    """windows (or documents) taken from it"""
    sequence_length: int | None = Field(None, ge=2)
    """tokens per window; none: the model's context, at most 2048"""
    batch_size: int = Field(8, ge=1)
    """windows per forward pass; the ranges do not depend on it"""
    ema_gamma: float = Field(0.01, gt=0, le=1)
    """weight of the newest window in the moving average of the ranges (arXiv 2411.07942)"""


class EvaluationConfig(_Config):
    data: str | None = None
    """text that perplexity is measured on; same forms as calibration.data"""
    text_column: str | None = None
    """column of records to read, as calibration.text_column"""
    samples: int = Field(128, ge=1)
    """windows (or documents) taken from it"""
    sequence_length: int | None = Field(None, ge=2)
    """tokens per window; none: the model's context, at most 2048"""
    batch_size: int = Field(8, ge=1)
    """windows per forward pass"""
    kl_tokens: int = Field(8192, ge=0)
    """tokens whose full-precision log-probabilities are kept for the KL divergence"""


class WeightsConfig(_Config):
    scheme: SchemeName = "none"
    """bits of weights and activations"""
    method: Literal["rtn", "qllm"] | None = None
    """rtn: round to nearest; qllm: channel reassembly and low-rank correction; none: qllm where quantize has
    calibration.data"""
    group_size: int | None = Field(None, ge=1)
    """input features that share a weight scale; none: one scale per output channel"""
    symmetric: bool = False
    """weights without a zero point"""
    shard_groups: int = Field(8, ge=1)
    """equal slices of a row-parallel input, each with its own activation scale: a multiple of every tp size used"""
    attention: bool | None = None
    """quantize Q, K and V per token and head, to the bits of the activations; none: with method=qllm and --ablation"""


DRIFT_THRESHOLD = 0.1  # share of values beyond their calibrated range from which a site falls back to bf16
PAPER = {"scale": "static", "allocation": "uniform"}  # arXiv 2411.07942, where it differs from our defaults


class CommConfig(_Config):
    preset: Literal["best", "paper"] = "best"
    """paper: static ranges and two tiers, where scale and allocation are not given (arXiv 2411.07942)"""
    mode: CommMode | None = None
    """native: all-reduce in the model's dtype; bf16: all-reduce of bf16 values; one_shot: all-gather of low-bit
    messages, local sum; two_shot: all-to-all of them, the sums rounded again and all-gathered; exact_sum: all-reduce
    of integers; auto: the fastest for each message, by cost_table; none: one_shot if the artifact has a plan, else
    native"""
    cost_table: str | None = None
    """mode=auto: file that `benchmark collectives --tune` wrote for as many ranks; none: measured when the model
    starts"""
    bits: int = Field(4, ge=2, le=8)
    """bits of a feature that does not travel in bf16"""
    bf16_fraction: float = Field(1 / 64, ge=0, le=1)
    """share of the features that travel in bf16"""
    selection: Literal["top", "random"] = "top"
    """which features: those of widest range, or any (the paper's control)"""
    symmetric: bool = False
    """scale=static: ranges without a zero point"""
    scale: Literal["static", "rank1"] = "rank1"
    """static: a feature's calibrated range; rank1: its standard deviation times the token's own size, which is sent"""
    allocation: Literal["uniform", "adaptive"] = "adaptive"
    """adaptive: 2 to 8 bits by feature, of the same size over all sites as bits and bf16_fraction would be"""
    clipping: Literal["none", "histogram"] = "none"
    """scale=static: histogram: ranges of least squared error, from a histogram of every feature (clipping.py)"""
    second_bits: int = Field(5, ge=2, le=8)
    """two_shot: bits of the sums on their way back"""
    carrier_bits: Literal[8, 16] = 8
    """exact_sum: bits of an integer, of which log2(tp) keep the sum from overflowing"""
    drift_threshold: float | None = Field(DRIFT_THRESHOLD, ge=0, le=1)
    """a site falls back to bf16 where a larger share of its values lies beyond the calibrated range; none: never"""
    gather: bool = False
    """sequence parallelism: also calibrate and quantize the all-gather of the normed activation (engine=megatron)"""
    tp_sizes: tuple[int, ...] = (2, 4, 8)
    """tensor-parallel sizes whose ranges one calibration pass records, where they divide the model"""

    @model_validator(mode="before")
    @classmethod
    def _of_the_preset(cls, values: Any) -> Any:
        return {**PAPER, **values} if isinstance(values, dict) and values.get("preset") == "paper" else values

    @model_validator(mode="after")
    def _what_goes_together(self) -> CommConfig:
        if self.selection == "random" and self.allocation == "adaptive":
            raise ValueError("selection=random chooses bf16 features; set comm.allocation=uniform or comm.preset=paper")
        if self.clipping == "histogram" and self.scale == "rank1":
            raise ValueError("clipping=histogram is of static ranges; set comm.scale=static or comm.preset=paper")
        if self.symmetric and (self.scale == "rank1" or self.clipping == "histogram"):
            raise ValueError("symmetric=true is of ranges as they were seen; set comm.preset=paper and no clipping")
        if self.cost_table is not None and self.mode != "auto":
            raise ValueError("cost_table needs mode=auto")
        return self

    @field_validator("tp_sizes")
    @classmethod
    def _at_least_two(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(size < 2 for size in value):
            raise ValueError("a tensor-parallel size is at least 2")
        return value


class ReassemblyConfig(_Config):
    """Channel reassembly before a linear's quantization (QLLM, section 4.1)."""

    mode: Literal["adaptive", "fixed", "none"] = "adaptive"
    """adaptive: the expansion with the smallest error of the block's output, none among them; fixed: `expansion`
    everywhere"""
    expansion: float = Field(0.01, gt=0, le=1)
    """mode=fixed: channels added by splitting, as a share of the width (the paper's gamma)"""
    expansions: tuple[float, ...] = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
    """mode=adaptive: the candidates"""
    merge: bool = True
    """merge as many channels as were added; false: the inputs grow wider (the paper's ablation)"""
    o_proj: bool = False
    """also before the attention's output projection"""

    @field_validator("expansions")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(not 0 < ratio <= 1 for ratio in value):
            raise ValueError("expansions are one or more shares of the width, above 0 and at most 1")
        return value

    @model_validator(mode="after")
    def _equal_widths(self) -> ReassemblyConfig:
        if not self.merge and self.mode == "adaptive":
            raise ValueError("merge=false needs mode=fixed: all shards have to grow by the same number of channels")
        return self


class CorrectionConfig(_Config):
    """Low-rank correction of groups of blocks, by gradient descent (QLLM, section 4.2)."""

    mode: Literal["merged", "branch", "none"] = "merged"
    """merged: deployed as Q(W + BA), trained through that rounding; branch: Q(W) beside BA in bf16"""
    rank: int = Field(4, ge=1)
    """of A and B"""
    blocks_per_group: int = Field(4, ge=1)
    """consecutive blocks that are trained together; the last group may be smaller"""
    epochs: int = Field(2, ge=1)
    """passes over the calibration windows, per group"""
    batch_size: int = Field(1, ge=1)
    """windows per step, of all data-parallel ranks together"""
    learning_rate: float = Field(5e-3, gt=0, allow_inf_nan=False)
    """AdamW's first; it falls linearly to 0"""
    train_norms: bool = False
    """also train the gains of the blocks' norms"""
    through_communication: bool = False
    """the student's partial sums pass the collective of virtual_tp (or tp) ranks, so its error is corrected too"""


class StageConfig(_Config):
    """What all commands share."""

    model: str | None = None
    """folder or hub id of a causal LM; "embedded" is the small Llama inside this package"""
    artifact: str | None = None
    """folder of a LowBitCheckpoint and/or its CommPlans, as calibrate and quantize write it"""
    engine: EngineName = "huggingface"
    """what runs the model"""
    tp: int = Field(1, ge=1)
    """tensor-parallel processes (engine=deepspeed or megatron)"""
    pp: int = Field(1, ge=1)
    """pipeline stages (engine=megatron)"""
    sequence_parallel: bool = False
    """between the linears each tensor-parallel rank holds a share of the tokens (engine=megatron)"""
    virtual_tp: int = Field(1, ge=1)
    """tensor-parallel ranks simulated inside one process (engine=huggingface)"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU"""
    seed: int = Field(0, ge=0, lt=2**63)
    """of every random choice"""
    inject_outliers: float | None = Field(None, gt=0, allow_inf_nan=False)
    """multiply 1 % of the channels at inject_at by this factor, and undo it in what reads them: the function stays"""
    inject_at: tuple[Literal["norm", "up_down", "v_o"], ...] = ("norm",)
    """where: a norm's gain and the linears that read it; rows of up and columns of down; rows of v and columns of o"""
    output_dir: str = "runs/lowbit"
    """results, metrics.jsonl and artifacts"""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases logging from rank 0"""

    @field_validator("wandb", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads a bare off as false


class CalibrateConfig(StageConfig):
    calibration: CalibrationConfig = CalibrationConfig()
    comm: CommConfig = CommConfig()
    dp: int = Field(1, ge=1)
    """data-parallel ranks: each takes a share of the calibration windows (not with engine=deepspeed, nor method=rtn)"""


class RatesConfig(_Config):
    """What a rank does per second, for --dry-run; none: measured on this machine (the network: left out)."""

    flops: float | None = Field(None, gt=0, allow_inf_nan=False)
    """floating-point operations of matrix products, as reached rather than as advertised"""
    memory: float | None = Field(None, gt=0, allow_inf_nan=False)
    """bytes read and written, for rounding and statistics"""
    disk: float | None = Field(None, gt=0, allow_inf_nan=False)
    """bytes of weights read or written"""
    network: float | None = Field(None, gt=0, allow_inf_nan=False)
    """bytes received from other ranks"""


class QuantizeConfig(CalibrateConfig):
    weights: WeightsConfig = WeightsConfig(scheme="W4A8")
    reassembly: ReassemblyConfig = ReassemblyConfig()
    correction: CorrectionConfig = CorrectionConfig()
    dry_run: bool = False
    """print shards, shapes, bytes and time per group, and stop (also --dry-run)"""
    architecture: dict[str, Any] | None = None
    """fields of the model's config.json, so that a dry run needs no download"""
    rates: RatesConfig = RatesConfig()
    """of the machine that a dry run is about, where it is not this one"""


class GenerateConfig(StageConfig):
    calibration: CalibrationConfig = CalibrationConfig()
    comm: CommConfig = CommConfig()
    weights: WeightsConfig = WeightsConfig()
    prompt: str = Field("Once upon a time", min_length=1)
    """text to continue"""
    prompts: str | None = None
    """text file of prompts, one per line, instead of `prompt`"""
    batching: Literal["static", "dynamic"] = "dynamic"
    """engine=megatron: its StaticInferenceEngine, or DynamicInferenceEngine (continuous batching)"""
    max_batch: int = Field(8, ge=1)
    """engine=megatron: prompts in flight at once"""
    max_new_tokens: int = Field(64, ge=1)
    """tokens to add"""
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    """0: greedy"""


class ParityConfig(StageConfig):
    output_dir: str = "runs/parity"
    engines: tuple[EngineName, ...] = ("huggingface", "deepspeed", "megatron")
    """engines to compare; huggingface, which is the reference, is always among them"""
    tp_sizes: tuple[int, ...] = (1, 2, 4)
    """tensor-parallel sizes: real ranks, on huggingface virtual ones"""
    prompts: str | None = None
    """text file of prompts, one per line"""
    max_new_tokens: int = Field(32, ge=1)
    """tokens to add to each"""
    outcomes: bool = False
    """run one engine at one size here and write what it computes, for the parity run that started it"""


class EvaluateConfig(StageConfig):
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    comm: CommConfig = CommConfig()
    weights: WeightsConfig = WeightsConfig()
    ablation: bool = False
    """quantize in every way the QLLM paper compares, and evaluate each (also --ablation)"""
    comm_ablation: bool = False
    """send the partial sums of virtual_tp ranks in every way we know, and evaluate each (also --comm-ablation)"""
    reassembly: ReassemblyConfig = ReassemblyConfig()
    correction: CorrectionConfig = CorrectionConfig()

    @model_validator(mode="after")
    def _one_table(self) -> EvaluateConfig:
        if self.ablation and self.comm_ablation:
            raise ValueError("ablation and comm_ablation are two tables; ask for one at a time")
        return self


class DemoConfig(StageConfig):
    model: str | None = "embedded"
    engine: EngineName = "deepspeed"
    tp: int = Field(2, ge=1)
    output_dir: str = "runs/demo"
    calibration: CalibrationConfig = CalibrationConfig(data="stdlib:calibration", samples=64)
    evaluation: EvaluationConfig = EvaluationConfig(data="stdlib:validation", samples=64)
    prompt: str = Field("def read_lines(path):\n", min_length=1)
    """text the sample continues"""
    max_new_tokens: int = Field(48, ge=1)
    """tokens of the sample"""


StageT = TypeVar("StageT", bound=BaseModel)


def load_config(stage: type[StageT], file: str | None, overrides: list[str]) -> StageT:
    """The stage's config from a YAML file, then `key.path=value` overrides (values read as YAML).

    Raises LowBitError, one line, for a file that cannot be read and for keys and values that the stage does not take.
    """
    tree = stage().model_dump()  # a section that is given in part keeps the stage's other defaults
    given = {} if file is None else _read_file(stage, file)
    _choose_preset(tree, given, overrides)
    _merge(tree, given)
    for override in overrides:
        _override(stage, tree, override)
    try:
        config = stage.model_validate(tree)
    except ValidationError as error:
        raise LowBitError(_explain(stage, error)) from None
    _check_values(config.model_dump(), "")
    return config


def _read_file(stage: type[BaseModel], file: str) -> dict[str, Any]:
    try:
        text = _text_of(file) if os.path.isfile(file) else _text_of_pipe(file)
        given = parse_yaml(text, lambda path: _text_kind(_annotation(stage, list(path))))
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise LowBitError(f"cannot read config file {shown(file)}: {one_line(error)}") from None
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise LowBitError(f"config file {shown(file)} must hold keys and values, not {type(given).__name__}")
    return given


def _text_of(file: str) -> str:
    with open(file, encoding="utf-8-sig") as opened:  # a byte order mark is no part of the first key
        return opened.read(LONGEST + 1)


_text_of_pipe = cache(_text_of)  # arguments are parsed twice, and --config <(...) can be read once


def _override(stage: type[BaseModel], tree: dict[str, Any], override: str) -> None:
    """Put one `key.path=value` into the tree of values."""
    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or not key or len(path) > DEEPEST:
        raise LowBitError(f"override {shown(override)} is not of the form key.path=value")
    node = tree
    for parent in path[:-1]:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise LowBitError(f"override {shown(override)}: {shown(parent)} is a value, not a section")
    annotation, leaf = _annotation(stage, path), path[-1]
    if type(None) in get_args(annotation) and text in ("null", "none", ""):
        node[leaf] = None
    elif _text_kind(annotation) is not None:
        node[leaf] = text  # prompt=123 and model=007 stay what was typed
    else:
        try:
            node[leaf] = parse_yaml(text)
        except ValueError:
            node[leaf] = text  # no YAML: whether it is a value, the stage's model says


def _text_kind(annotation: Any) -> type | None:
    """`str` for a field that is text, type(None) for text that may be unset, None for all other fields."""
    if annotation is str:
        return str
    return type(None) if set(get_args(annotation)) == {str, type(None)} else None


def _check_values(value: Any, key: str) -> None:
    """Refuse what no path, model or counter can hold: NUL characters, halves of characters, integers beyond 64 bits."""
    if isinstance(value, dict):
        for name, below in value.items():
            _check_values(name, f"{key}, a key")
            _check_values(below, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            _check_values(item, key)
    elif isinstance(value, str):
        if "\0" in value:
            raise LowBitError(f"{key}={shown(value)}: holds a NUL character; leave it out")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise LowBitError(f"{key}={shown(value)}: holds bytes that are not UTF-8; write it in UTF-8") from None
    elif isinstance(value, int) and value.bit_length() > 64:
        raise LowBitError(f"{key}={shown(value)}: is beyond 64 bits; give a smaller number")


def _choose_preset(tree: dict[str, Any], given: dict[str, Any], overrides: list[str]) -> None:
    """The values of the preset, the last one named, go in before all that is given, which then wins."""
    comm = given.get("comm")
    named = [str(comm["preset"])] if isinstance(comm, dict) and "preset" in comm else []
    named += [text.strip(" '\"") for key, _, text in (o.partition("=") for o in overrides) if key == "comm.preset"]
    if named and named[-1] == "paper" and "comm" in tree:
        tree["comm"] |= PAPER


def _merge(tree: dict[str, Any], given: dict[str, Any]) -> None:
    for key, value in given.items():
        if isinstance(tree.get(key), dict) and isinstance(value, dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def one_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, cut where it is very long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _cut(lines[0], 500) if lines else type(error).__name__


def shown(value: Any) -> str:
    """The repr of a value that somebody gave, for a message: cut where it is long, whatever the value is."""
    try:
        return _cut(_REPR.repr(value), 200)
    except ValueError:  # Python writes out no integer of more than 4,300 digits
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 20]} ... ({len(text):,} characters)"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 150
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 20


def _annotation(stage: type[BaseModel], path: list[str]) -> Any:
    """The type of the field at `path`; None where there is no such field."""
    model: Any = stage
    for name in path[:-1]:
        if name not in getattr(model, "model_fields", {}):
            return None
        model = model.model_fields[name].annotation
    field = getattr(model, "model_fields", {}).get(path[-1])
    return None if field is None else field.annotation


def defaults(model: BaseModel, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of a config, in order."""
    values: dict[str, Any] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        values |= defaults(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name: value}
    return values


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys


def _explain(stage: type[BaseModel], error: ValidationError) -> str:
    """One line for the first problem: the key, the value, and the nearest valid name where one is near."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        valid = _keys(stage)
        leaves = {name.rpartition(".")[2]: name for name in valid}
        near = _nearest(key, valid) or leaves.get(_nearest(key.rpartition(".")[2], list(leaves)) or "")
        hint = f"; did you mean {near!r}?" if near else f"; valid keys: {', '.join(valid)}"
        return f"unknown config key {shown(key)}{hint}"
    key, value = _cut(key, 200), problem["input"]
    if problem["type"] == "literal_error":
        choices = [part.strip("' ") for part in str(problem["ctx"]["expected"]).replace(" or ", ", ").split(", ")]
        near = _nearest(str(value), choices) if isinstance(value, str) else None
        hint = f"; did you mean {near!r}?" if near else ""
        return f"{key}={shown(value)} is not one of {', '.join(choices)}{hint}"
    message = _cut(problem["msg"].removeprefix("Value error, "), 300)
    if not key:  # a rule between settings names them itself
        return message
    return f"{key}={shown(value)}: {message[:1].lower()}{message[1:]}"


def _nearest(name: str, choices: list[str]) -> str | None:
    """The choice that a name is a slip of; None where it could be several, or is no slip at all."""
    if len(name) > 100:
        return None
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return near[0] if near else None
