"""megatron-lowbit generate: continue a prompt; the text is streamed to standard output as it comes.

Of a file of prompts every line of output is a JSON object {"prompt": ..., "text": ...}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from megatron_lowbit.config import GenerateConfig, LowBitError, shown
from megatron_lowbit.launch.engines.base import Engine, GenerateOptions
from megatron_lowbit.launch.engines.prepare import apply_prepared, check_head, prepare_artifact
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.inputs import read_prompts
from megatron_lowbit.launch.rows import row_name
from megatron_lowbit.launch.runner import run_stage
from megatron_lowbit.launch.saturation import logged, measure_saturation, print_saturation
from megatron_lowbit.launch.text import Text, continuation
from megatron_lowbit.launch.tokenizer import check_tokenizer
from megatron_lowbit.runtime.distributed import PreemptionCheck, on_rank_zero
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger

CONFIG = GenerateConfig


def run(config: GenerateConfig, logger: MetricLogger) -> dict[str, Any]:
    prompts = [config.prompt] if config.prompts is None else on_rank_zero(lambda: read_prompts(config.prompts or ""))
    check_head(config)
    engine = start_engine(config, [config.weights])
    artifact = prepare_artifact(engine, config, logger)
    ids = [encode(engine, prompt) for prompt in prompts]
    apply_prepared(engine, artifact, config.comm)
    text = Streams(engine.tokenizer, prompts, ids) if env_rank() == 0 else None

    def on_token(number: int, token: int) -> None:
        if text is not None:
            text.put(number, token)

    start = time.perf_counter()
    options = GenerateOptions(
        config.max_new_tokens,
        config.temperature,
        config.batching,
        config.max_batch,
        config.seed,
        on_token,
        PreemptionCheck().check,
    )
    generated = engine.generate(ids, options)
    seconds = time.perf_counter() - start
    if text is not None:
        text.end()
    tokens = sum(map(len, generated))
    name = row_name(engine, artifact, config.comm.mode)
    saturation = {"name": name, **measure_saturation(engine)}
    logger.log(new_tokens=tokens, seconds=seconds, **logged(saturation))
    if env_rank() == 0:
        print_saturation([saturation], sys.stderr)  # standard output is the text
    rows = [
        {
            **saturation,
            "prompt": prompt,
            "text": continuation(engine.tokenizer, encoded, new),
            "tokens": new,
            "new_tokens": len(new),
            "seconds": seconds,
        }
        for prompt, encoded, new in zip(prompts, ids, generated, strict=True)
    ]
    return {"rows": rows}


def encode(engine: Engine, prompt: str) -> list[int]:
    """Return the token ids of a prompt.

    Raises LowBitError for one that is empty, holds what the model has no token for, or leaves no room in its context.
    """
    tokenizer = engine.tokenizer
    check_tokenizer(tokenizer)
    encoded = tokenizer(prompt, verbose=False)
    ids, vocab = encoded["input_ids"], engine.text_config.vocab_size
    if not [token for token in ids if token != tokenizer.bos_token_id]:
        raise LowBitError(f"prompt {shown(prompt)} has no tokens; give some text")
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids and str(tokenizer.unk_token) not in prompt:
        span = encoded.token_to_chars(ids.index(unknown)) if tokenizer.is_fast else None
        what = repr(prompt[span.start : span.end]) if span is not None else f"a part of {shown(prompt)}"
        raise LowBitError(f"the tokenizer has no token for {what}; leave it out of the prompt")
    beyond = [token for token in ids if token >= vocab]
    if beyond:
        raise LowBitError(
            f"the tokenizer's token {beyond[0]} ({tokenizer.decode(beyond[:1])!r}) is beyond the model's vocabulary of "
            f"{vocab}; use the model's own tokenizer"
        )
    if len(ids) >= engine.context:
        raise LowBitError(f"the prompt has {len(ids)} tokens, the model's context is {engine.context}; shorten it")
    return ids


class Streams:
    """Text on standard output: the answer to one prompt as its tokens come; of several prompts, when all are done, one
    line each, a JSON object with the prompt and its answer, in their order."""

    def __init__(self, tokenizer: Any, prompts: Sequence[str], ids: Sequence[Sequence[int]]):
        self.prompts = prompts
        self.texts = [Text(tokenizer, encoded) for encoded in ids]
        self.pieces: list[list[str]] = [[] for _ in ids]

    def put(self, number: int, token: int) -> None:
        self._tell(number, self.texts[number].put(token))

    def end(self) -> None:
        for number, text in enumerate(self.texts):
            self._tell(number, text.end())
        if len(self.prompts) == 1:
            print()
            return
        for prompt, pieces in zip(self.prompts, self.pieces, strict=True):
            print(json.dumps({"prompt": prompt, "text": "".join(pieces)}, ensure_ascii=False))

    def _tell(self, number: int, new: str) -> None:
        if len(self.prompts) == 1:
            print(new, end="", flush=True)
        else:
            self.pieces[number].append(new)


def continue_text(engine: Engine, prompt: str, max_new_tokens: int) -> str:
    """Return the greedy continuation of one prompt."""
    ids = encode(engine, prompt)
    (new,) = engine.generate([ids], GenerateOptions(max_new_tokens))
    return continuation(engine.tokenizer, ids, new)


if __name__ == "__main__":
    sys.exit(run_stage("generate", sys.argv[1:]))
