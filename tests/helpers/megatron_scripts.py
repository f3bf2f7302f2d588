"""Megatron-LM's own scripts in tests: where they are, whether they can run here, and what they should print."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from commands import needs_megatron
from tiny_models import embedded_folder

import megatron_lowbit as lowbit

ROOT = os.environ.get("MEGATRON_LM")
IMPORTED = (
    "six",
    "simpy",
    "tiktoken",
    "sentencepiece",
    "pybind11",
    "flask",
    "flask_restful",
    "zmq",
    "quart",
    "hypercorn",
)
LACKING = [name for name in IMPORTED if find_spec(name) is None]
WHY = "MEGATRON_LM is not set to Megatron-LM's folder" if ROOT is None else f"its scripts import {', '.join(LACKING)}"
real = [
    needs_megatron,
    pytest.mark.slow,
    pytest.mark.skipif(ROOT is None or bool(LACKING), reason=WHY),
]
ON_CPU = """
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization --micro-batch-size 1
    --no-masked-softmax-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion
"""
PROMPTS = ["def read_lines(path):", "import os"]


def find_script(name: str) -> Path | None:
    """A script of this Megatron-LM's; None where it has none of this name."""
    if ROOT is None:
        return None
    root = Path(ROOT)
    folders = [root, root / "tools", root / "tools" / "checkpoint", *root.glob("examples/inference/**/")]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def options(folder: Path) -> list[str]:
    return (folder / "megatron_arguments.txt").read_text().split()


def continued(
    artifact: Path,
    virtual_tp: int,
    begins: bool = False,
    folder: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, list[int]]:
    """{prompt: 16 tokens}, greedily, by transformers; begins: with <s> in front of the prompt, which Megatron's engines
    take away and its servers leave; folder: of the model, None: the embedded one."""
    folder = folder or embedded_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    lowbit.apply_to_huggingface(model, artifact, virtual_tp=virtual_tp)
    found = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=begins, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)
        found[prompt] = whole[0, ids.shape[1] :].tolist()
    return found


def generated(output: Path) -> dict[str, list[int]]:
    """{prompt: tokens} of an --output-path."""
    results = [result for result in json.loads(output.read_text()).values() if isinstance(result, dict)]
    return {result["input_prompt"]: result["generated_tokens"] for result in results}
