"""Starts the engine that a config names."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import (
    StageConfig,
    WeightsConfig,
)
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.engines.deepspeed import DeepSpeedEngine, init_deepspeed
from megatron_lowbit.launch.engines.prepare import take_checkpoints
from megatron_lowbit.launch.loading import load_model, read_config, read_tokenizer, source_of
from megatron_lowbit.runtime.distributed import (
    device,
    seed_everything,
)


def start_engine(config: StageConfig, weights: Sequence[WeightsConfig] = ()) -> Engine:
    """Load the model and tokenizer, take the artifact's checkpoint or quantize as `weights` say, start the engine.

    Quantization comes before the engine, which would shard the full-precision weights.
    """
    seed_everything(config.seed)
    if config.engine == "megatron":
        from megatron_lowbit.launch.engines.megatron import start_megatron

        return start_megatron(config, weights)
    world = init_deepspeed() if config.engine == "deepspeed" else 1
    folder = Artifact.load(config.artifact) if config.artifact is not None else Artifact()
    source = source_of(config, folder.checkpoint)
    hf_config, tokenizer = read_config(source), read_tokenizer(source)
    model = load_model(config, hf_config, folder.checkpoint)
    text_config = huggingface.model_config(model)
    tp_size = max(config.tp, config.virtual_tp)
    huggingface.check_divides(text_config, tp_size, "virtual_tp" if config.virtual_tp > 1 else "tp")
    checkpoints = take_checkpoints(folder.checkpoint, model, weights, hf_config.dtype, config.seed)
    context = getattr(text_config, "max_position_embeddings", None) or 2048
    full_precision = not hasattr(model, "_lowbit_fingerprint")
    shared = (tokenizer, hf_config, context, tp_size, checkpoints, folder.plans, full_precision)
    if config.engine == "huggingface":
        return Engine(model.eval().to(device()), *shared)
    # DeepSpeed moves each rank's shards; the whole model may not fit
    from megatron_lowbit.adapters import deepspeed

    return DeepSpeedEngine(deepspeed.init_engine(model.eval(), world, next(model.parameters()).dtype), *shared)
