"""Megatron's own MegatronLLM and MegatronAsyncLLM with their coordinator:
what ranks run for test_megatron_versions.py."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from typing import Any
from unittest import mock

import tiny_models
from megatron_cases import gpt_model
from megatron_checkpoint_cases import writers
from megatron_groups import parallel
from megatron_version_cases import NEW_TOKENS, PROMPTS

import megatron_lowbit as lowbit
from megatron_lowbit.artifact import Artifact

PACKAGES = ("zmq", "msgpack", "quart", "hypercorn")


class Ids:
    """A tokenizer for which a text is a row of ids. Megatron hands it to the processes that it starts."""

    eod = eos_id = bos = pad = -1
    vocab_size = tiny_models.VOCAB

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(number)) for number in ids)

    def offsets(self, ids: Any, text: str) -> list[int]:
        return [0] * len(ids)


def lacking() -> str | None:
    """What this Megatron-Core cannot run them without; None where they run."""
    if find_spec("megatron.core.inference.apis") is None:
        return "MegatronLLM is in megatron-core 0.18 and newer"
    missing = [name for name in PACKAGES if find_spec(name) is None]
    return f"Megatron's coordinator and server import {', '.join(missing)}" if missing else None


def with_coordinator(rank: int, size: int, artifact: Artifact, port: int) -> dict[str, list[list[int]]]:
    """New tokens of each prompt by MegatronLLM.generate, MegatronAsyncLLM.generate and over HTTP, on rank 0; the
    others hear of requests from the coordinator."""
    from megatron.core.inference.apis import MegatronLLM
    from megatron.core.inference.config import InferenceConfig

    from megatron_lowbit.adapters.megatron import cpu_shims
    from megatron_lowbit.adapters.megatron.versions import engine_runs

    with parallel(size), writers(), cpu_shims.engines(), engine_runs():
        gpt = lowbit.apply_to_megatron(gpt_model(tiny_models.build("llama")), artifact)
        options: dict[str, Any] = {
            "model": gpt,
            "tokenizer": Ids(),
            "inference_config": InferenceConfig(max_sequence_length=64, buffer_size_gb=0.01),
            "use_coordinator": True,
            "coordinator_host": "127.0.0.1",
        }
        results = {}
        with MegatronLLM(**options) as llm:
            results["MegatronLLM"] = _tokens(llm.generate(PROMPTS, _sampling())) if llm.is_primary_rank else []
        return results | asyncio.run(_served(options, port))


async def _served(options: dict[str, Any], port: int) -> dict[str, list[list[int]]]:
    from megatron.core.inference.apis import MegatronAsyncLLM, ServeConfig
    from megatron.core.inference.text_generation_server.dynamic_text_gen_server import text_generation_server

    # It hands a socket on by its number; a pool's workers start processes by a server, which has not got it.
    forks = mock.patch.object(text_generation_server, "mp", multiprocessing.get_context("fork"))
    async with MegatronAsyncLLM(**options) as llm:
        with forks:
            await llm.serve(ServeConfig("127.0.0.1", port, frontend_replicas=1), blocking=False)
        if not llm.is_primary_rank:
            return {}
        made = _tokens(await llm.generate(PROMPTS, _sampling()))
        return {"MegatronAsyncLLM": made, "served": await asyncio.to_thread(_ask, port)}


def _sampling() -> Any:
    from megatron.core.inference.sampling_params import SamplingParams

    return SamplingParams(top_k=1, num_tokens_to_generate=NEW_TOKENS, termination_id=-1)


def _tokens(requests: Any) -> list[list[int]]:
    return [[int(token) for token in request.generated_tokens] for request in requests]


def _ask(port: int) -> list[list[int]]:
    body = {"prompt": PROMPTS, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    url = f"http://127.0.0.1:{port}/v1/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return [Ids().tokenize(choice["text"]) for choice in json.load(answer)["choices"]]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        except urllib.error.URLError:  # not up yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
