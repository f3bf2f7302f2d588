"""What each engine makes of one artifact, for models of many kinds; prints the table of docs/engines.md.
`python tests/helpers/engine_matrix.py`

An artifact in W4A8 (experts in W4A16) with a plan for two ranks is made of a tiny random model. The cell of an engine
is `yes` where two ranks of it give the logits of two virtual ranks in Hugging Face, or the line that refuses it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import family_models
import megatron_cases
import tiny_models
import torch
from closeness import assert_equal_but_for_flips
from deepspeed_cases import EVERY_SITE
from deepspeed_shard_cases import engine_of
from megatron_groups import parallel
from megatron_model_cases import stage_logits
from rank_pool import RankPool
from torch import Tensor

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.huggingface.experts import attach_experts, find_experts
from megatron_lowbit.config import LowBitError, WeightsConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "engines.md"


def _rope(rope_type: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **settings}}


# As Megatron's own are: factor 8 of 8,192 positions.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "factor": 8.0}
_LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32, "factor": 4.0}
# {row: (family of family_models.py, what differs)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, `rope_type` llama3": ("llama", _rope("llama3", **_LLAMA3)),
    "Llama, `rope_type` yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "Llama, `rope_type` longrope": ("llama", _rope("longrope", **_LONG)),
    "Llama 4 text": ("llama4_text", {}),
    "Mistral": ("mistral", {}),
    "Mixtral": ("mixtral", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", {"num_experts": 4}),
    "Qwen2-MoE, with a shared expert": ("qwen2_moe", {"num_experts": 4}),
    "dots.llm1, with shared experts": ("dots1", {}),
    "Phi-3, Phi-4": ("phi3", {}),
    "Gemma 2": ("gemma2", {}),
    "Gemma 3": ("gemma3_text", {}),
    "Granite": ("granite", {}),
    "OLMo 2": ("olmo2", {}),
    "GLM-4": ("glm4", {}),
    "StarCoder 2": ("starcoder2", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "OPT": ("opt", {}),
}
ENGINES = ("Hugging Face", "DeepSpeed", "Megatron-Core")


def cells(name: str, pool: RankPool, folder: Path) -> list[str]:
    """What becomes of a row's model on each of ENGINES: "yes", or the line that is said, with MODEL for its name.

    pool: of two ranks. Raises AssertionError where an engine runs and gives other logits.
    """
    family, changes = MODELS[name]
    model = family_models.build(family, **changes)
    artifact = tiny_models.make_artifact(model, "W4A8", (2,))
    assert artifact.checkpoint is not None
    if find_experts(model):
        experts = WeightsConfig(scheme="W4A8", experts="W4A16")
        artifact = dataclasses.replace(artifact, checkpoint=attach_experts(model, artifact.checkpoint, experts))
    tiny_models.save_artifact(artifact, folder)
    expected = _virtual(model, folder)
    found = ["yes"]
    for engine in (_on_deepspeed, _on_megatron):
        ranks = pool.run(engine, family, changes, folder)
        if isinstance(ranks[0], str):
            assert ranks == ranks[:1] * 2, "the ranks say different things"
            names = (type(model).__name__, repr(model.config.model_type))
            found.append(ranks[0].replace(names[0], "MODEL").replace(names[1], "MODEL"))
        else:
            for y in ranks:
                assert_equal_but_for_flips(y, expected)
            found.append("yes")
    return found


def _virtual(model: Any, folder: Path) -> Tensor:
    """Logits on two virtual ranks; without an artifact they are the model's own."""
    ids = megatron_cases.token_ids()
    plain = tiny_models.logits(model, ids)
    scale = plain.abs().max()
    whole = tiny_models.logits(lowbit.apply_to_huggingface(model, lowbit.Artifact(), 2), ids)
    torch.testing.assert_close(whole, plain, rtol=0, atol=1e-5 * float(scale))  # float32 sums in another order
    patched = tiny_models.logits(lowbit.apply_to_huggingface(model, folder, 2, EVERY_SITE), ids)
    assert patched.isfinite().all() and (patched - plain).abs().max() > 1e-3 * scale
    return patched


def _on_deepspeed(rank: int, size: int, family: str, changes: dict[str, Any], folder: Path) -> Tensor | str:
    try:
        engine = engine_of("init_inference", family_models.build(family, **changes), size, {})
        lowbit.apply_to_deepspeed(engine, folder, EVERY_SITE)
    except LowBitError as error:
        return str(error)
    return tiny_models.logits(engine.module, megatron_cases.token_ids())


def _on_megatron(rank: int, size: int, family: str, changes: dict[str, Any], folder: Path) -> Tensor | str:
    with parallel(size):
        try:
            model = megatron_cases.gpt_model(family_models.build(family, **changes))
            lowbit.apply_to_megatron(model, folder, EVERY_SITE)
        except LowBitError as error:
            return str(error)
        return stage_logits(model, tiny_models.VOCAB)


def written() -> dict[str, list[str]]:
    """{row: what docs/engines.md says of each engine}, with the line that a number stands for."""
    lines = PAGE.read_text().splitlines()
    numbered = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    notes = {f"no ({number})": text.strip("`") for number, text in numbered.items()}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {name: [notes.get(cell, cell) for cell in row] for name, *row in rows[1:]}


def main() -> None:
    pool = RankPool(2)
    notes: list[str] = []
    print(f"| model | {' | '.join(ENGINES)} |\n|{'---|' * 4}", flush=True)
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            row = cells(name, pool, Path(folder))
        notes += [said for said in dict.fromkeys(row) if said not in ("yes", *notes)]
        print(
            "|", " | ".join([name, *(s if s == "yes" else f"no ({notes.index(s) + 1})" for s in row)]), "|", flush=True
        )
    print("\n" + "\n".join(f"{number}. `{said}`" for number, said in enumerate(notes, 1)))
    pool.close()


if __name__ == "__main__":
    main()
