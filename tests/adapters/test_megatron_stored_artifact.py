"""A GPTModel with packed weights gives back the artifact that was applied to it, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stored_artifact_cases as cases
import torch
from artifact_files import differing
from commands import needs_megatron
from megatron_artifacts import gather_artifact
from reassembled_models import make_plan, reassembled
from tiny_models import build, make_artifact, mixed_bits, save_artifact

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface.experts import attach_experts
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import WeightsConfig
from megatron_lowbit.launch.engines.prepare import round_weights
from megatron_lowbit.quant.affine import LowRank, QuantizedWeight
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan

pytestmark = needs_megatron

# {name: (architecture, what differs)}. 131 words: two ranks pad them.
MODELS = {
    "llama": ("llama", {"intermediate_size": 96}),
    "biases": ("llama with biases", {}),
    "padded": ("qwen2", {"vocab_size": 131, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {}),
    "mixed": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "shared": ("qwen2_moe", {"mlp_only_layers": [0]}),
}


def with_branches(model: Any) -> Artifact:
    """Reassembled norms and down projections, and in the first block low-rank branches of unlike ranks."""
    made = reassembled(model, make_artifact(model, "W4A16"))
    checkpoint, draw = made.checkpoint, torch.Generator().manual_seed(3)
    assert checkpoint is not None
    linears, plans, branches = dict(checkpoint.linears), dict(checkpoint.reassembly), {}
    for number, (name, (_, linear)) in enumerate(huggingface.find_linears(model).items()):
        weight = linear.weight.data
        if name.endswith("down_proj"):
            halves = [make_plan(weight.shape[1] // 2, seed) for seed in (number, number + 1)]
            plans[name] = ReassemblyPlan.join(halves)
            linears[name] = QuantizedWeight.from_float(plans[name].weights(weight), 4)
        if name.startswith("model.layers.0."):
            sizes = (1 + number % 3, linears[name].in_features), (len(weight), 1 + number % 3)
            branches[name] = LowRank(*(torch.randn(size, generator=draw).bfloat16() for size in sizes))
    return Artifact(replace(checkpoint, linears=linears, reassembly=plans, low_rank=branches), made.plans)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, tuple[Path, Artifact]]:
    """{name: (model folder, artifact)}."""
    root = tmp_path_factory.mktemp("models")
    models = {name: build(architecture, **changes) for name, (architecture, changes) in MODELS.items()}
    for name, hf in models.items():
        hf.save_pretrained(root / name)
    folders = {name: root / name for name in models}
    llama = models["llama"]
    rotated = round_weights(llama, WeightsConfig(scheme="W4A4", attention=True, rotation="hadamard"), None, seed=2)
    artifacts = {
        "llama": ("llama", make_artifact(llama, "W4A8", (2, 4))),
        "bits of their own": ("llama", Artifact(mixed_bits(llama), {})),
        "rotated": ("llama", Artifact(rotated, {})),
        "biases": ("biases", make_artifact(models["biases"], "W4A4", (2,))),
        "padded": ("padded", make_artifact(models["padded"], "W8A8", (2,))),
        "reassembled": ("llama", with_branches(llama)),
        "shared expert": ("shared", make_artifact(models["shared"], "W4A8", (2,))),
    }
    for name, experts in {"mixtral": {"experts": "W4A16", "group_size": 8}, "mixed": {"experts": "W8A8"}}.items():
        checkpoint = make_artifact(models[name], "W8A8").checkpoint
        assert checkpoint is not None
        config = WeightsConfig(scheme="W8A8", **experts)
        artifacts[f"{name} experts"] = name, Artifact(attach_experts(models[name], checkpoint, config), {})
    return {name: (folders[model], artifact) for name, (model, artifact) in artifacts.items()}


@pytest.mark.parametrize("layout", [{"tp": 1}, {"tp": 2}, {"tp": 1, "pp": 2}, {"tp": 1, "ep": 2}])
def test_the_way_back(two_ranks, jobs, tmp_path, layout):
    given = {tmp_path / name: job for name, job in jobs.items()}
    if layout == {"tp": 1, "ep": 2}:
        given = {folder: job for folder, job in given.items() if "experts" in folder.name}
    first, second = two_ranks.run(cases.back, layout, given)
    assert all(first) and second == [layout["tp"] == 1 and layout.get("pp", 1) == 1] * len(given)
    for folder, (_, artifact) in given.items():
        assert differing(save_artifact(artifact, tmp_path / "before" / folder.name), folder) == [], folder.name


def test_ranges_of_the_gather(two_ranks, jobs, tmp_path):
    """They are described, because a model without sequence parallelism does not hold them."""
    hf = build("llama")
    hf.save_pretrained(tmp_path / "model")
    artifact = gather_artifact((2,))
    assert artifact.plan(2).gathers
    two_ranks.run(cases.back, {"tp": 2}, {tmp_path / "back": (tmp_path / "model", artifact)})
    assert differing(save_artifact(artifact, tmp_path / "artifact"), tmp_path / "back") == []


def test_what_the_model_lacks(two_ranks, jobs):
    folder, artifact = jobs["llama"]
    longer = build("llama", num_hidden_layers=3, intermediate_size=96)
    line = two_ranks.run(cases.lacking, folder, artifact, make_artifact(longer, "W4A8"))[0]
    assert "lacks model.layers.2.self_attn.q_proj.packed_weight of its artifact" in line and "\n" not in line
