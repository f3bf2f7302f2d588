"""Sections of the commands' configs: each a frozen model, and the docstring below a field is its description.

`--help` and docs/configuration.md print these descriptions.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from megatron_lowbit.config.errors import LowBitError, explain, nearest, notice, shown
from megatron_lowbit.config.presets import with_preset

SchemeName = Literal["none", "W4A16", "W4A8", "W4A4", "W6A6", "W8A8", "autoA16", "autoA8", "autoA4"]
EngineName = Literal["huggingface", "deepspeed", "megatron"]
CommMode = Literal["native", "bf16", "one_shot", "two_shot", "exact_sum", "auto"]


def check_mode(name: str, mode: Any) -> None:
    """Raise LowBitError where `mode` is neither None nor a CommMode; name: of the argument."""
    modes = get_args(CommMode)
    if mode is not None and mode not in modes:
        near = nearest(str(mode), list(modes))
        hint = f"; did you mean {near!r}?" if near else ""
        raise LowBitError(f"{name}={shown(mode)} is not one of {', '.join(modes)}{hint}")


class FrozenConfig(BaseModel):
    """A model whose values are checked when it is made (LowBitError, one line) and stay."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise LowBitError(explain(type(self), error)) from None

    # Sections inside a config are validated as part of it, so that messages name the whole key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class CalibrationConfig(FrozenConfig):
    """Text that the ranges of communication, and QLLM's reassembly and correction, are calibrated on."""

    data: str | None = None
    """text that the ranges are measured on: hub id[:config[:split]], a text file, records (.json, .jsonl, .csv,
    .tsv, .parquet), each also .gz or .zst, a folder of datasets.save_to_disk, or stdlib:calibration"""
    text_column: str | None = None
    """column of records to read; none: one that is named text, content, ..., or the longest; conversations by the
    tokenizer's chat template"""
    samples: int = Field(128, ge=1)
    """windows (or documents) taken from the text"""
    sequence_length: int | None = Field(None, ge=2)
    """tokens per window; none: the model's context, at most 2048"""
    batch_size: int = Field(8, ge=1)
    """windows per forward pass; the ranges do not depend on it"""
    ema_gamma: float = Field(0.01, gt=0, le=1)
    """weight of the newest window in the moving average of the ranges (arXiv 2411.07942)"""


LOCAL_TASK = "local_"  # how the names of tasks begin that read evaluation.task_data


class EvaluationConfig(FrozenConfig):
    """Text that perplexity and the KL divergence are measured on, and tasks that accuracy is."""

    data: str | None = None
    """text that perplexity is measured on; same forms as calibration.data, and the papers' own texts and windows:
    gptq:wikitext2, gptq:ptb:FILE, gptq:c4, each also with :FILE, all windows of 2,048 tokens unless said otherwise"""
    text_column: str | None = None
    """column of records to read, as calibration.text_column"""
    samples: int = Field(128, ge=1)
    """windows (or documents) taken from the text"""
    sequence_length: int | None = Field(None, ge=2)
    """tokens per window; none: the model's context, at most 2048"""
    batch_size: int = Field(8, ge=1)
    """windows per forward pass"""
    kl_tokens: int = Field(8192, ge=0)
    """tokens whose full-precision log-probabilities are kept for the KL divergence"""
    tasks: tuple[str, ...] = ()
    """zero-shot tasks, scored by lm-eval: its own by name (arc_easy, piqa, ...), from the hub; names that begin with
    local_ read files in evaluation.task_data"""
    task_samples: int | None = Field(None, ge=1)
    """documents of each task, the first ones (of a group: of each of its tasks); none: all"""
    task_data: str | None = None
    """folder with the questions of local_ tasks: piqa.jsonl, arc_easy.jsonl.gz, BLiMP.zip, ..."""

    @model_validator(mode="before")
    @classmethod
    def _as_the_papers_do(cls, values: Any) -> Any:
        return with_preset("evaluation", values)

    @model_validator(mode="after")
    def _for_tasks(self) -> EvaluationConfig:
        twice = [task for task in self.tasks if self.tasks.count(task) > 1]
        if twice:
            raise ValueError(f"tasks names {shown(twice[0])} twice")
        for key in ("task_samples", "task_data"):
            if getattr(self, key) is not None and not self.tasks:
                raise ValueError(f"{key}={shown(getattr(self, key))} has no effect without tasks")
        if self.task_data is not None and not any(task.startswith(LOCAL_TASK) for task in self.tasks):
            raise ValueError(
                f"task_data={shown(self.task_data)} has no effect: only tasks named {LOCAL_TASK}... read it"
            )
        return self


class WeightsConfig(FrozenConfig):
    """Quantization of weights and activations."""

    preset: Literal["best", "qllm"] | None = None
    """values of weights.*, reassembly.* and correction.* that are not given. best: what measures best
    (method qllm with learned rotations, clipping and GPTQ, and no correction); qllm: the paper's steps and training
    (arXiv 2310.08041); none: the defaults below"""
    scheme: SchemeName = "none"
    """bits of weights and activations; auto: 2 to 8 bits for the weights of each linear, chosen on calibration.data
    under weights.budget"""
    budget: float | None = Field(None, ge=2, le=8, allow_inf_nan=False)
    """scheme=auto...: mean bits per weight of all quantized linears together, at most"""
    method: Literal["rtn", "qllm"] | None = None
    """rtn: round to nearest; qllm: channel reassembly and low-rank correction; none: qllm where quantize has
    calibration.data"""
    group_size: int | None = Field(None, ge=1)
    """input features that share a weight scale; none: one scale per output channel"""
    symmetric: bool = False
    """weights without a zero point"""
    zero_point: Literal["integer", "real"] = "integer"
    """of weights. integer: a code, so that a weight of 0 stays 0; real: both ends of a range are codes, so that weights
    that were in codes of the same bits and groups before come back"""
    clipping: Literal["none", "mse", "learned"] = "none"
    """ranges. none: from the smallest to the largest value; mse: narrower where the squared error is smaller (of
    weights; with method=qllm also of activations, and weighted by the input's size); learned: trained with a merged
    correction"""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """codes of weights. nearest: each by itself; gptq: each makes up for the error of those before it
    (arXiv 2210.17323; method=qllm)"""
    shard_groups: int | None = Field(None, ge=1)
    """equal slices of a row-parallel input, each with its own activation scale: a multiple of every tp size used;
    none: 8, or the number near 8 that suits the model's heads (6 for 9 heads)"""
    attention: bool | None = None
    """quantize Q, K and V per token and head, to the bits of the activations; none: with method=qllm and --ablation"""
    rotation: Literal["none", "hadamard", "learned"] = "none"
    """hadamard: rotate the residual stream, the heads and the MLPs' inputs before anything is rounded, function and
    shards kept; learned: the rotations of the residual stream and of V are trained (method=qllm)"""
    experts: Literal["none", "W4A16", "W8A8"] = "none"
    """bits of the experts of a mixture of experts, each rounded for its own tokens; none: they stay in full precision,
    as the router always does"""
    lm_head_bits: int = Field(0, ge=0, le=8)
    """bits of the output projection's weight and, where the model ties the two, of the embedding: 2 to 8; 0: as they
    are"""

    @model_validator(mode="before")
    @classmethod
    def _of_the_preset(cls, values: Any) -> Any:
        return with_preset("weights", values)

    @field_validator("lm_head_bits")
    @classmethod
    def _more_than_a_sign(cls, value: int) -> int:
        if value == 1:
            raise ValueError("it is 0 (off), or 2 to 8")
        return value

    @model_validator(mode="after")
    def _a_zero_point_to_round(self) -> WeightsConfig:
        if self.symmetric and self.real_zero:
            raise ValueError("zero_point=real has no effect with symmetric=true; leave one of them out")
        return self

    @model_validator(mode="after")
    def _a_budget_to_choose_under(self) -> WeightsConfig:
        if self.chooses_bits and self.budget is None:
            raise ValueError(
                f"scheme={self.scheme} chooses bits under a budget; set weights.budget, such as 4.5 bits per weight"
            )
        if self.budget is not None and not self.chooses_bits:
            raise ValueError(
                f"budget={self.budget:g} has no effect with scheme={self.scheme}; leave it out, or set weights.scheme "
                "to autoA16, autoA8 or autoA4"
            )
        return self

    @model_validator(mode="after")
    def _experts_beside_linears(self) -> WeightsConfig:
        if self.experts != "none" and self.scheme == "none":
            raise ValueError(
                f"experts={self.experts} needs a weights.scheme for the other linears, such as {self.experts}"
            )
        return self

    @property
    def real_zero(self) -> bool:
        """Tell whether zero points are not rounded."""
        return self.zero_point == "real"

    @property
    def chooses_bits(self) -> bool:
        """Tell whether each linear has its own number of bits."""
        return self.scheme.startswith("auto")


DRIFT_THRESHOLD = 0.1  # share of values beyond their calibrated range from which a site falls back to bf16


class CommConfig(FrozenConfig):
    """Low-bit communication: how the partial sums of row-parallel linears travel (arXiv 2411.07942)."""

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
    scale: Literal["static", "per_token"] = "per_token"
    """static: a feature's calibrated range; per_token: its standard deviation times the token's own size, which is
    sent"""
    allocation: Literal["uniform", "adaptive"] = "adaptive"
    """adaptive: 2 to 8 bits by feature, of the same size over all sites as bits and bf16_fraction would be"""
    clipping: Literal["none", "histogram"] = "none"
    """scale=static: histogram: ranges of least squared error, from a histogram of every feature"""
    second_bits: int = Field(5, ge=2, le=8)
    """two_shot: bits of the sums on their way back"""
    carrier_bits: Literal[8, 16] = 8
    """exact_sum: bits of an integer, of which log2(tp) keep the sum from overflowing"""
    drift_threshold: float | None = Field(DRIFT_THRESHOLD, ge=0, le=1)
    """a site falls back to bf16 where a larger share of its values lies beyond the calibrated range; none: never"""
    gather: bool = False
    """sequence parallelism: also calibrate and quantize the all-gather of the normed activation (engine=megatron)"""
    tp_sizes: tuple[int, ...] | None = None
    """tensor-parallel sizes whose ranges one calibration pass records; none: those up to 8 that divide the model's
    heads and MLP, 2, 4 and 8 for most"""

    @model_validator(mode="before")
    @classmethod
    def _of_the_preset(cls, values: Any) -> Any:
        return with_preset("comm", values)

    @field_validator("scale", mode="before")
    @classmethod
    def _old_spelling(cls, value: Any) -> Any:
        if value == "rank1":
            notice("comm.scale=rank1 is now called comm.scale=per_token; both mean the same")
            return "per_token"
        return value

    @model_validator(mode="after")
    def _what_goes_together(self) -> CommConfig:
        if self.selection == "random" and self.allocation == "adaptive":
            raise ValueError("selection=random chooses bf16 features; set comm.allocation=uniform or comm.preset=paper")
        if self.clipping == "histogram" and self.scale == "per_token":
            raise ValueError("clipping=histogram is of static ranges; set comm.scale=static or comm.preset=paper")
        if self.symmetric and (self.scale == "per_token" or self.clipping == "histogram"):
            raise ValueError("symmetric=true is of ranges as they were seen; set comm.preset=paper and no clipping")
        if self.cost_table is not None and self.mode != "auto":
            raise ValueError("cost_table needs mode=auto")
        return self

    @field_validator("tp_sizes")
    @classmethod
    def _at_least_two(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if any(size < 2 for size in value or ()):
            raise ValueError("a tensor-parallel size is at least 2")
        return value


# What a plan is built from, and so decided by an artifact that has one: all but what counts while the collective runs,
# and what calibrate records.
PLAN_KEYS = tuple(
    key for key in CommConfig.model_fields if key not in ("mode", "cost_table", "drift_threshold", "gather", "tp_sizes")
)


class ReassemblyConfig(FrozenConfig):
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


class CorrectionConfig(FrozenConfig):
    """Low-rank correction of groups of blocks, by gradient descent (QLLM, section 4.2)."""

    mode: Literal["merged", "branch", "none"] = "merged"
    """merged: deployed as Q(W + BA), trained through that rounding; branch: Q(W) beside BA in bf16"""
    rank: int | Literal["auto"] = 4
    """rank of the correction: columns of B and rows of A; auto: of each linear by the error that it takes away"""
    rank_budget: int = Field(4, ge=1)
    """rank=auto: as many parameters in a group of blocks as this rank would give all of its linears"""
    blocks_per_group: int = Field(4, ge=1)
    """consecutive blocks that are trained together; the last group may be smaller"""
    epochs: int = Field(2, ge=1)
    """passes over the calibration windows, per group"""
    batch_size: int = Field(1, ge=1)
    """windows per step, of all data-parallel ranks together"""
    learning_rate: float = Field(5e-3, gt=0, allow_inf_nan=False)
    """learning rate of AdamW at the first step; it falls linearly to 0"""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """AdamW's weight decay of A and B"""
    holdout: float = Field(1 / 8, ge=0, lt=1)
    """share of the windows, the last ones, that are not trained on and tell after which epoch the loss was smallest
    (at least one); 0: all are trained on, and the last epoch is kept"""
    clipping_rate: float = Field(5e-2, gt=0, allow_inf_nan=False)
    """weights.clipping=learned: learning rate of the ranges"""
    train_norms: bool = False
    """also train the gains of the blocks' norms"""
    through_communication: bool = False
    """the student's partial sums pass the collective of virtual_tp (or tp) ranks, so its error is corrected too"""

    @field_validator("rank", mode="before")
    @classmethod
    def _rank(cls, value: Any) -> Any:
        if value != "auto" and not (type(value) is int and value >= 1):  # a union would say it in two lines
            raise ValueError("it is auto, or an integer of 1 or more")
        return value


class RotationConfig(FrozenConfig):
    """Training of weights.rotation=learned, by gradient descent on orthogonal matrices (SpinQuant)."""

    epochs: int = Field(4, ge=1)
    """passes over the model and the calibration windows, before anything is quantized"""
    batch_size: int = Field(4, ge=1)
    """windows per step, of all data-parallel ranks together"""
    learning_rate: float = Field(0.03, gt=0, le=0.5)
    """angle in radians (root mean square over the axes) by which the first step rotates; it falls linearly to 0"""


class RatesConfig(FrozenConfig):
    """What a rank does per second, for --dry-run; none: measured on this machine (the network: left out)."""

    flops: float | None = Field(None, gt=0, allow_inf_nan=False)
    """floating-point operations of matrix products, as reached rather than as advertised"""
    memory: float | None = Field(None, gt=0, allow_inf_nan=False)
    """bytes read and written, for rounding and statistics"""
    disk: float | None = Field(None, gt=0, allow_inf_nan=False)
    """bytes of weights read or written"""
    network: float | None = Field(None, gt=0, allow_inf_nan=False)
    """bytes received from other ranks"""
