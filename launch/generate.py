"""megatron-lowbit generate: continue a prompt; the text is streamed to standard output as it comes."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from megatron_lowbit.config import GenerateConfig, LowBitError
from megatron_lowbit.distributed import device, env_rank
from megatron_lowbit.launch.engine import Engine, prepare_artifact, start_engine
from megatron_lowbit.launch.evaluate import row_name
from megatron_lowbit.launch.runner import run_stage
from megatron_lowbit.metrics import MetricLogger

CONFIG = GenerateConfig


def run(config: GenerateConfig, logger: MetricLogger) -> dict[str, Any]:
    engine = start_engine(config, [config.weights])
    artifact = prepare_artifact(engine, config, logger)
    if artifact.checkpoint is not None or engine.tp_size > 1:
        engine.apply(artifact, config.comm.mode)
    start = time.perf_counter()
    text, tokens = continue_text(engine, config.prompt, config.max_new_tokens, config.temperature, stream=True)
    seconds = time.perf_counter() - start
    logger.log(new_tokens=tokens, seconds=seconds)
    name = row_name(artifact, engine.tp_size, config.comm.mode)
    return {"rows": [{"name": name, "prompt": config.prompt, "text": text, "new_tokens": tokens, "seconds": seconds}]}


def continue_text(
    engine: Engine, prompt: str, max_new_tokens: int, temperature: float = 0.0, stream: bool = False
) -> tuple[str, int]:
    """(continuation, its tokens); greedy at temperature 0. Raises LowBitError for a prompt beyond the context."""
    from transformers import TextStreamer

    ids = torch.tensor([engine.tokenizer(prompt, verbose=False)["input_ids"]])
    if ids.shape[1] == 0:
        raise LowBitError(f"prompt {prompt!r} has no tokens; give some text")
    if ids.shape[1] >= engine.context:
        raise LowBitError(f"the prompt has {ids.shape[1]} tokens, the model's context is {engine.context}; shorten it")
    streamer = TextStreamer(engine.tokenizer, skip_prompt=True) if stream and env_rank() == 0 else None
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = engine.module.generate(
        input_ids=ids.to(device()),
        attention_mask=torch.ones_like(ids).to(device()),
        max_new_tokens=min(max_new_tokens, engine.context - ids.shape[1]),
        pad_token_id=engine.tokenizer.eos_token_id,
        streamer=streamer,
        **sampling,
    )
    new = output[0, ids.shape[1] :]
    return engine.tokenizer.decode(new, skip_special_tokens=True), len(new)


if __name__ == "__main__":
    sys.exit(run_stage("generate", sys.argv[1:]))
