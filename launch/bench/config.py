"""Keys of `benchmark` and of its kinds (collectives, kernels, linear, model, gpu), as in config.py."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from megatron_lowbit.config import (
    CalibrationConfig,
    CommConfig,
    EngineName,
    LowBitError,
    StageConfig,
    WeightsConfig,
    defaults,
    shown,
)
from megatron_lowbit.launch.bench.shapes import LINEARS, MODELS, LinearName, ModelName, all_shapes, parse_shape


def _rate(value: Any) -> Any:
    if value is None or value == "none":
        return None
    if not re.fullmatch(r"[1-9]\d{0,3}(mbit|gbit)", str(value)):
        raise ValueError("give a rate such as 100mbit, 1gbit or 10gbit")
    return value


Rate = Annotated[str | None, BeforeValidator(_rate)]


class BenchmarkConfig(StageConfig):
    model: str | None = "embedded"
    engine: EngineName = "deepspeed"
    tp: int = Field(2, ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    output_dir: str = "runs/benchmark"
    calibration: CalibrationConfig = CalibrationConfig(data="stdlib:calibration", samples=16)
    repeats: int = Field(40, ge=2)
    """pairs of forwards, one on each side of every comparison"""
    tokens: int = Field(1024, ge=1)
    """tokens per forward"""
    comm: CommConfig = CommConfig()
    """how partial sums travel in the rows that are not bf16"""
    rate: Rate = None
    """every rank's link, such as 1gbit (needs root, ip and tc); none: loopback"""

    @model_validator(mode="after")
    def _low_bit(self) -> BenchmarkConfig:
        if self.comm.mode in ("native", "bf16"):
            raise ValueError(f"comm.mode={self.comm.mode} is what the others are compared with; name another")
        if self.rate is not None and self.engine == "huggingface":
            raise ValueError("rate needs ranks on a network; set engine=deepspeed or engine=megatron")
        return self


class BenchmarkKernelsConfig(StageConfig):
    """Times the ops alone, on one thread, without a model; of the shared keys it has seed, output_dir and wandb."""

    output_dir: str = "runs/benchmark_kernels"
    tokens: int = Field(4096, ge=1)
    """tokens of a message"""
    features: int = Field(4096, ge=64)
    """values per token"""
    ranks: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field((2, 4, 8), min_length=1)
    """numbers of messages that are added"""
    repeats: int = Field(11, ge=3)
    """rounds of all that is compared"""
    compile: bool = True
    """also torch.compile of the reference"""


class BenchmarkGpuConfig(StageConfig):
    """Checks and times what needs a GPU, without a model; of the shared keys it has seed, output_dir and wandb."""

    output_dir: str = "runs/benchmark_gpu"
    tokens: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 16, 64, 256, 1024, 4096), min_length=1)
    """tokens of a linear"""
    seconds: float = Field(420, gt=0, allow_inf_nan=False)
    """time for all of it; what does not fit is left out"""


class BenchmarkCollectivesConfig(StageConfig):
    """Times all-reduces alone, without a model; of the keys that commands share it has seed, output_dir and wandb."""

    output_dir: str = "runs/benchmark_collectives"
    comm: CommConfig = CommConfig()
    """bits and scales of our collectives; the plan is calibrated on random partial sums"""
    ranks: tuple[int, ...] = (2, 4, 8)
    """numbers of processes"""
    sizes: tuple[int, ...] = (2**16, 2**20, 2**22, 2**24)
    """bytes of a bf16 tensor [tokens, 1024] (below 2 KiB: of one token); 64KiB and 1MiB are understood"""
    rate: Rate = None
    """every rank's link, such as 100mbit, 1gbit or 10gbit (needs root, ip and tc); none: loopback"""
    tune: bool = False
    """write <output_dir>/costs-tp<N>.json, which comm.cost_table takes, and add auto to the algorithms (also --tune)"""
    algorithms: tuple[Literal["bf16", "fp32", "group32", "one_shot", "two_shot", "exact_sum", "auto"], ...] = (
        *("bf16", "fp32", "group32"),
        *("one_shot", "two_shot", "exact_sum"),
    )
    """bf16, fp32: stock all-reduces, the former always among them; group32: two-shot with dynamic groups of 32
    (peers); auto: the fastest of ours, as measured before"""
    repeats: int = Field(200, ge=3)
    """rounds of all algorithms, at most"""
    cell_seconds: float = Field(10, gt=0, allow_inf_nan=False)
    """time for the rounds of one number of ranks and one size; there are at least three rounds"""

    @field_validator("ranks", "sizes", "algorithms", mode="before")
    @classmethod
    def _listed(cls, value: Any, info: ValidationInfo) -> Any:
        values = _as_list(value)
        if info.field_name == "sizes":
            return [_bytes(size) if isinstance(size, str) else size for size in values]
        return values

    @field_validator("ranks")
    @classmethod
    def _some_ranks(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or any(not 2 <= ranks <= 64 for ranks in value):
            raise ValueError("give one or more numbers of ranks from 2 to 64")
        return value

    @field_validator("sizes")
    @classmethod
    def _whole_tokens(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or any(size < 64 or size % (64 if size < 2**11 else 2**11) for size in value):
            raise ValueError("give one or more sizes in multiples of 2KiB (of 64 bytes below that), such as 64KiB")
        return value

    @field_validator("algorithms")
    @classmethod
    def _with_the_baseline(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("bf16", *value)))

    @model_validator(mode="after")
    def _tuned(self) -> BenchmarkCollectivesConfig:
        if self.tune and "auto" not in self.algorithms:
            return self.model_copy(update={"algorithms": (*self.algorithms, "auto")})
        return self


Count = Annotated[int, Field(ge=1, le=2**20)]


class BenchmarkLinearConfig(StageConfig):
    """Times quantized linears alone, on a CPU; of the keys that commands share it has seed, output_dir and wandb."""

    output_dir: str = "runs/benchmark_linear"
    shapes: tuple[Annotated[str, BeforeValidator(str)], ...] = ("4096x4096", "11008x4096", "4096x11008")
    """weights to multiply with, outputs x inputs"""
    models: tuple[ModelName, ...] = ()
    """whose linears are measured too"""
    linears: tuple[LinearName, ...] = LINEARS
    """which of the models' linears; shapes that are alike are measured once"""
    tp_sizes: tuple[Count, ...] = Field((1,), min_length=1)
    """ranks among which the models' linears are shared out: one rank's share is measured"""
    tokens: tuple[Count, ...] = Field((1, 16, 256, 1024), min_length=1)
    """tokens of a product"""
    schemes: tuple[str, ...] = ("W4A8", "W4A4", "W8A8", "W4A16")
    """bits of weights and activations, 2 to 8 each; activations also 16, which are not quantized"""
    act_groups: tuple[Count, ...] = Field((1, 8), min_length=1)
    """slices of a token with a scale of their own"""
    threads: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field((1,), min_length=1)
    """threads of a product; of one its CPU time counts, of several the time that passes"""
    peers: tuple[Literal["packed_bf16", "int_mm", "qlinear", "int4pack"], ...] = (
        *("packed_bf16", "int_mm"),
        *("qlinear", "int4pack"),
    )
    """what is measured beside them: oneDNN with a prepacked bf16 weight, torch._int_mm, onednn.qlinear_pointwise,
    torch._weight_int4pack_mm_for_cpu; F.linear in bf16 always is"""
    weights: int | None = Field(None, ge=1, le=4096)
    """copies of each weight, which take turns, so that no product finds its weight in a cache; none: as many as that
    needs, 12 at least"""
    memory_share: float = Field(0.5, gt=0, le=1)
    """share of the free memory that the weights may take: fewer copies where they would take more"""
    repeats: int = Field(11, ge=3)
    """rounds of all that is compared, at most"""
    cell_seconds: float = Field(20, gt=0, allow_inf_nan=False)
    """time for the rounds of one shape and one number of tokens; there are at least three rounds"""

    _listed = field_validator(
        *("shapes", "models", "linears", "tp_sizes", "tokens", "schemes", "act_groups", "threads", "peers"),
        mode="before",
    )(lambda value: _as_list(value))

    @field_validator("shapes")
    @classmethod
    def _are_shapes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_shape(text)
        return value

    @field_validator("schemes")
    @classmethod
    def _are_schemes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not re.fullmatch(r"W[2-8]A([2-8]|16)", name):
                raise ValueError(
                    f"{name!r} is no scheme; write W4A8 (weights in 2 to 8 bits, activations in 2 to 8 or 16)"
                )
        return value

    @model_validator(mode="after")
    def _something(self) -> BenchmarkLinearConfig:
        if not self.shapes and not self.models:
            raise ValueError(f"nothing to measure: give shapes such as 4096x4096, or models of {', '.join(MODELS)}")
        if not self.schemes and not self.peers:
            raise ValueError("nothing to compare: give schemes such as W4A8, or peers")
        all_shapes(self.shapes, self.models, self.linears, self.tp_sizes)  # a width that the ranks do not divide
        return self


RANDOM_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


class BenchmarkModelConfig(StageConfig):
    """Times a quantized model against the same in bf16, on a CPU, in one process; of the keys that commands share it
    has seed, output_dir and wandb."""

    output_dir: str = "runs/benchmark_model"
    models: tuple[Annotated[str, Field(min_length=1)], ...] = Field(("random", "embedded"), min_length=1)
    """random: a model with random weights; embedded; a folder or hub id"""
    architecture: dict[str, Any] = Field(default_factory=dict)
    """fields of the random model's config.json, where it is not a Llama of 374 million parameters: hidden_size 1024,
    intermediate_size 2816, 24 blocks, 16 heads, vocab_size 32000"""
    weights: WeightsConfig = WeightsConfig(scheme="W4A8")
    tokens: int = Field(512, ge=1)
    """tokens of the prompt (prefill); fewer where the model's context is shorter"""
    new_tokens: int = Field(8, ge=1)
    """tokens that follow it in each round, one at a time (decode)"""
    threads: int = Field(1, ge=1, le=1024)
    """threads of both models; of one its CPU time counts, of several the time that passes"""
    repeats: int = Field(5, ge=2)
    """rounds of both models"""

    _listed = field_validator("models", mode="before")(lambda value: _as_list(value))

    @model_validator(mode="after")
    def _rounded(self) -> BenchmarkModelConfig:
        if self.weights.scheme == "none":
            raise ValueError("weights.scheme=none quantizes nothing; choose W4A16, W4A8, W4A4, W6A6 or W8A8")
        if self.weights.chooses_bits:
            raise ValueError(
                f"weights.scheme={self.weights.scheme} chooses bits on text; choose W4A8, or another of equal bits"
            )
        if self.weights.method == "qllm":
            raise ValueError("weights.method=qllm learns from text; here weights are rounded to nearest: leave it out")
        return self


def _as_list(value: Any) -> Any:
    """Split text at its commas; a value by itself is a list of one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value if isinstance(value, list | tuple) else [value]


def _bytes(text: str) -> int:
    """Parse a number of bytes: 64KiB -> 65536."""
    match = re.fullmatch(r"(\d+) *(|B|KiB|MiB|GiB)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write bytes, or 64KiB, 4MiB")
    return int(match[1]) * {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[match[2]]


def refuse_unused(config: StageConfig, unused: list[str], where: str = "where no model runs") -> None:
    """Refuse a key that changes nothing: it is an error, not a surprise in the figures."""
    comm = {f"comm.{key}": default for key, default in defaults(CommConfig()).items()}
    usual, given = {**defaults(StageConfig()), **comm}, defaults(config)
    for key in unused:
        if given[key] != usual[key]:
            other = "set algorithms=" if key == "comm.mode" else "leave it out"
            value = str(given[key])
            value = value if len(value) <= 100 else shown(value)
            raise LowBitError(f"{key}={value} changes nothing here, {where}; {other}")


SHARED_KEYS = ("seed", "output_dir", "wandb")  # that all commands have and benchmarks without a model use
UNUSED = [key for key in StageConfig.model_fields if key not in SHARED_KEYS]
