"""The config of each command: a frozen model of its own keys and of the sections it takes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_lowbit.config.presets import with_presets
from megatron_lowbit.config.sections import (
    CalibrationConfig,
    CommConfig,
    CorrectionConfig,
    EngineName,
    EvaluationConfig,
    FrozenConfig,
    RatesConfig,
    ReassemblyConfig,
    RotationConfig,
    WeightsConfig,
)


class StageConfig(FrozenConfig):
    """What all commands share."""

    model: str | None = None
    """folder or hub id of a causal LM; "embedded" is the small Llama inside this package"""
    artifact: str | None = None
    """folder of quantized weights, communication plans, or both, as calibrate and quantize write it"""
    engine: EngineName = "huggingface"
    """framework that runs the model"""
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
    """seed of every random choice"""
    inject_outliers: float | None = Field(None, gt=0, allow_inf_nan=False)
    """multiply 1 % of the channels at inject_at by this factor, and undo it in what reads them: the function stays"""
    inject_at: tuple[Literal["norm", "up_down", "v_o"], ...] = ("norm",)
    """where: a norm's gain and the linears that read it; rows of up and columns of down; rows of v and columns of o"""
    output_dir: str = "runs/lowbit"
    """folder of results, metrics.jsonl and artifacts"""
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


class QuantizeConfig(CalibrateConfig):
    weights: WeightsConfig = WeightsConfig(scheme="W4A8")
    reassembly: ReassemblyConfig = ReassemblyConfig()
    correction: CorrectionConfig = CorrectionConfig()
    rotation: RotationConfig = RotationConfig()
    export: Literal["huggingface", "compressed-tensors"] | None = None
    """format in which the artifact is also exported at the end, to the folder of that name in output_dir"""
    dry_run: bool = False
    """print shards, shapes, bytes and time per group, and stop (also --dry-run)"""
    architecture: dict[str, Any] | None = None
    """fields of the model's config.json, so that a dry run needs no download"""
    rates: RatesConfig = RatesConfig()
    """what the machine that a dry run is about does per second, where it is not this one"""

    @model_validator(mode="before")
    @classmethod
    def _of_the_preset(cls, values: Any) -> Any:
        return with_presets(values)

    @model_validator(mode="after")
    def _trains_a_rotation(self) -> QuantizeConfig:
        if self.weights.rotation != "learned" and self.rotation != RotationConfig():
            raise ValueError("rotation has no effect unless it is learned; set weights.rotation=learned")
        return self


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
    """temperature of the sampling; 0: greedy"""


class ServeConfig(StageConfig):
    output_dir: str = "runs/serve"
    calibration: CalibrationConfig = CalibrationConfig()
    comm: CommConfig = CommConfig()
    weights: WeightsConfig = WeightsConfig()
    host: str = Field("127.0.0.1", min_length=1)
    """address to listen at; 0.0.0.0 lets other machines in: set MEGATRON_LOWBIT_API_KEY then"""
    port: int = Field(8000, ge=0, le=65535)
    """port to listen at; 0: any free one, which the first line names"""
    max_batch: int = Field(32, ge=1)
    """sequences that are generated at once"""
    max_queue: int = Field(128, ge=0)
    """sequences that wait for their turn; a request beyond is answered 429"""
    timeout: float = Field(600.0, gt=0, allow_inf_nan=False)
    """seconds that a request may take, its wait included"""


class ExportConfig(StageConfig):
    output_dir: str = "runs/export"
    format: Literal["huggingface", "compressed-tensors"] = "huggingface"
    """huggingface: weights that stand for the codes, in dtype (auto: bfloat16), which stock transformers loads;
    compressed-tensors: the codes of W4A16 and W8A8 artifacts, for transformers and vLLM"""


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


class ConvertConfig(StageConfig):
    engine: EngineName = "megatron"
    output_dir: str = "runs/convert"
    checkpoint: str | None = None
    """folder that a Megatron-LM script's --save, or convert, wrote: in full precision it becomes a Hugging Face folder,
    low-bit (convert's own) an artifact, with config and tokenizer of `model` or of its own; none: model or artifact
    becomes such a checkpoint"""

    @model_validator(mode="after")
    def _on_megatron(self) -> ConvertConfig:
        if self.engine != "megatron":
            raise ValueError(f"engine={self.engine} has no effect: convert builds Megatron's model; leave it out")
        return self


class EvaluateConfig(StageConfig):
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    comm: CommConfig = CommConfig()
    weights: WeightsConfig = WeightsConfig()
    ablation: bool = False
    """quantize in every way the QLLM paper compares, and evaluate each (also --ablation)"""
    comm_ablation: bool = False
    """send the partial sums of virtual_tp ranks in every way we know, and evaluate each (also --comm-ablation)"""
    token_ablation: bool = False
    """send a share of the tokens in more bits and the others in fewer, and evaluate each (also --token-ablation)"""
    experiment: Literal["lowbit_comm", "qllm"] | None = None
    """a paper's tables, resumable row by row (also --experiment NAME). lowbit_comm: full precision, Int4, random and
    chosen bf16 features at comm.tp_sizes ranks, and ours; qllm: rounding, weights.preset=qllm and best at W6A6, W4A8
    and W4A4, or at weights.scheme alone"""
    reassembly: ReassemblyConfig = ReassemblyConfig()
    correction: CorrectionConfig = CorrectionConfig()
    dp: int = Field(1, ge=1)
    """data-parallel copies of the model: each takes a share of the windows and of a task's documents (not with
    engine=deepspeed)"""

    @model_validator(mode="before")
    @classmethod
    def _of_the_preset(cls, values: Any) -> Any:
        return with_presets(values)

    @model_validator(mode="after")
    def _one_table(self) -> EvaluateConfig:
        asked = [key for key in ("ablation", "comm_ablation", "token_ablation", "experiment") if getattr(self, key)]
        if len(asked) > 1:
            raise ValueError(f"{asked[0]} and {asked[1]} are two tables; ask for one at a time")
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

    @model_validator(mode="after")
    def _without_tasks(self) -> DemoConfig:
        if self.evaluation.tasks:
            raise ValueError("evaluation.tasks has no effect: demo measures perplexity and KL; use evaluate")
        return self
