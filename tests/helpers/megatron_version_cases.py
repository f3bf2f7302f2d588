"""All that one artifact does in the Megatron-Core that is installed, on one rank and on two; prints a row of the table
in docs/megatron.md. `PYTHONPATH=FOLDER python tests/helpers/megatron_version_cases.py` for a version in a folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
from megatron_cases import gpt_model, logits
from megatron_checkpoint_cases import writers
from megatron_groups import parallel
from megatron_hybrid_cases import hybrid_model
from megatron_training_cases import backward
from rank_pool import RankPool

import megatron_lowbit as lowbit
from megatron_lowbit.artifact import Artifact

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5]]
NEW_TOKENS = 6
WAYS = ("static", "dynamic", "MegatronLLM", "HybridModel", "train", "save", "load")


def everything(rank: int, size: int, artifact: Artifact, tokens: list[list[int]], folder: Path) -> dict[str, Any]:
    """{way: True; False, if it gave another result; None, if this version has no such thing}, and the version.

    tokens: what transformers continues the prompts with.
    """
    from megatron_lowbit.adapters.megatron import checkpoint, core_version, lowbit_spec
    from megatron_lowbit.adapters.megatron import model as megatron_model
    from megatron_lowbit.adapters.megatron.inference import Request, generate
    from megatron_lowbit.adapters.megatron.spec import block_spec

    results: dict[str, Any] = {"version": core_version()}
    with parallel(size), writers():
        hf = tiny_models.build("llama")
        gpt = lowbit.apply_to_megatron(gpt_model(hf), artifact)
        requests = [Request(prompt, NEW_TOKENS) for prompt in PROMPTS]
        results |= {how: generate(gpt, requests, batching=how) == tokens for how in ("static", "dynamic")}
        made = by_megatron_llm(gpt)
        results["MegatronLLM"] = None if made is None else made == tokens
        expected = logits(gpt)
        results["HybridModel"] = torch.equal(logits(lowbit.apply_to_megatron(hybrid_model(hf), artifact)), expected)
        config = megatron_model.transformer_config(hf.config)
        trained = gpt_model(hf, spec=lowbit_spec(block_spec(config), "W4A8"))
        trained.train()
        backward(trained)
        results["train"] = all(p.grad is not None and p.grad.isfinite().all() for p in trained.parameters())
        checkpoint.save_checkpoint(gpt, folder)
        results["save"] = any(folder.iterdir())
        other = gpt_model(tiny_models.build("llama"))
        checkpoint.load_checkpoint(other, folder)
        results["load"] = torch.equal(logits(other), expected)
    return results


def by_megatron_llm(gpt: Any) -> list[list[int]] | None:
    """What Megatron's own MegatronLLM makes of the prompts with a patched model; None before 0.18, which has none."""
    try:
        from megatron.core.inference.apis import MegatronLLM
    except ImportError:
        return None
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.sampling_params import SamplingParams

    from megatron_lowbit.adapters.megatron import cpu_shims
    from megatron_lowbit.adapters.megatron.inference import _NoTokenizer
    from megatron_lowbit.adapters.megatron.versions import engine_runs

    with cpu_shims.engines(), engine_runs():
        options = InferenceConfig(max_sequence_length=64, buffer_size_gb=0.01)
        tokenizer = _NoTokenizer(tiny_models.VOCAB)
        llm = MegatronLLM(model=gpt, tokenizer=tokenizer, inference_config=options, use_coordinator=False)
        sampling = SamplingParams(top_k=1, num_tokens_to_generate=NEW_TOKENS, termination_id=-1)
        return [[int(token) for token in request.generated_tokens] for request in llm.generate(PROMPTS, sampling)]


def by_transformers(artifact: Artifact, size: int) -> list[list[int]]:
    hf = lowbit.apply_to_huggingface(tiny_models.build("llama"), artifact, size)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            output = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, **options)
            made.append(output[0, len(prompt) :].tolist())
    return made


def run(pool: RankPool, folder: Path) -> list[dict[str, Any]]:
    """What `everything` gives on each rank of a pool."""
    artifact = tiny_models.make_artifact(tiny_models.build("llama"), "W4A8", (pool.size,) if pool.size > 1 else ())
    return pool.run(everything, artifact, by_transformers(artifact, pool.size), folder, timeout=1800)


def row(results: Callable[[int], dict[str, Any]]) -> str:
    words = {True: "yes", False: "other result", None: "-"}
    cells = {size: results(size) for size in (1, 2)}
    columns = (" / ".join(words[cells[size][way]] for size in cells) for way in WAYS)
    return f"| {cells[1]['version']} | {' | '.join(columns)} |"


def main() -> None:
    def on(size: int) -> dict[str, Any]:
        pool = RankPool(size)
        with tempfile.TemporaryDirectory() as folder:
            ranks = run(pool, Path(folder) / "checkpoint")
        pool.close()
        assert all(results == ranks[0] for results in ranks)
        return ranks[0]

    print(row(on))


if __name__ == "__main__":
    main()
