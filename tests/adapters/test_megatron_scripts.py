"""Megatron-LM's own scripts, unchanged, on CPUs. MEGATRON_LM names the folder of its repository, which is no part of
this one; without it, or without the packages that its scripts import, they are skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from commands import free_port, needs_megatron, run_here
from tiny_models import embedded_folder

import megatron_lowbit as lowbit
from megatron_lowbit.adapters import megatron_script_on_cpu

ROOT = os.environ.get("MEGATRON_LM")
LACKING = [name for name in ("six", "simpy", "tiktoken", "sentencepiece", "pybind11") if find_spec(name) is None]
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
TRAINING = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 1023 --seq-length 64 --global-batch-size 2 --lr 1e-4
    --lr-decay-style constant --eval-iters 0 --eval-interval 100 --log-interval 1 --num-workers 0 --save-interval 100
    --no-create-attention-mask-in-dataloader --no-save-rng --no-load-rng
"""
DYNAMIC = """
    --inference-dynamic-batching-buffer-size-gb 0.01 --inference-dynamic-batching-max-requests 4
    --inference-dynamic-batching-block-size 64
"""
PROMPTS = ["def read_lines(path):", "import os"]


@pytest.mark.parametrize("argv", [[], ["pretrain_gpt.py"]])
def test_a_script_needs_its_repository(monkeypatch, tmp_path, argv):
    monkeypatch.setenv("MEGATRON_LM", str(tmp_path))
    with pytest.raises(SystemExit, match="set MEGATRON_LM to Megatron-LM's folder"):
        megatron_script_on_cpu.main(argv)


def run_script(name: str, *arguments: object, ranks: int = 1, **environment: str) -> str:
    """Run a script on its ranks; returns what rank 0 has printed."""
    assert ROOT is not None
    # Its makefile asks python3 where pybind11 is, and a python3-config, which may be another's, for the suffix.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment |= {"PATH": path, "MAKEFLAGS": f"LIBEXT={sysconfig.get_config_var('EXT_SUFFIX')}"}
    shared = {**os.environ, **environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    (script,) = Path(ROOT).glob(f"examples/inference/**/{name}" if "inference" in name else name)
    command = [sys.executable, "-m", "megatron_lowbit.adapters.megatron_script_on_cpu", str(script)]
    running = []
    for rank in range(ranks):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        env = {**shared, **{key: str(value) for key, value in numbers.items()}, "OMP_NUM_THREADS": "1"}
        words = [*command, *ON_CPU.split(), *map(str, arguments)]
        running.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    printed = [process.communicate(timeout=1800)[0] for process in running]
    assert [process.returncode for process in running] == [0] * ranks, printed[0][-4000:]
    return printed[0]


def options(folder: Path) -> list[str]:
    return (folder / "megatron_arguments.txt").read_text().split()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    settings = ["calibration.data=stdlib:calibration", "calibration.samples=4", "calibration.sequence_length=64"]
    scheme = ["weights.scheme=W4A8", "weights.method=rtn", "comm.tp_sizes=[2]"]
    assert run_here("quantize", "model=embedded", *scheme, *settings, f"output_dir={folder}") == 0
    return folder


@pytest.fixture(scope="module")
def checkpoints(artifact, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("converted")
    for name, source in {"full": "model=embedded", "low": f"artifact={artifact}"}.items():
        assert run_here("convert", source, f"output_dir={root / name}") == 0
    return {name: root / name / "megatron" for name in ("full", "low")}


def continued(artifact: Path, virtual_tp: int) -> dict[str, list[int]]:
    """{prompt: 16 tokens}, greedily, by transformers. Megatron's engines take <s> from in front of every prompt."""
    folder = embedded_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lowbit.apply_to_huggingface(model, artifact, virtual_tp=virtual_tp)
    found = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)
        found[prompt] = whole[0, ids.shape[1] :].tolist()
    return found


class TestScripts:
    pytestmark = real

    @pytest.mark.parametrize(("loaded", "tp"), [("full", 1), ("low", 2)])
    @pytest.mark.parametrize("batching", ["static", "dynamic"])
    def test_inference(self, artifact, checkpoints, tmp_path, batching, loaded, tp):
        """From the environment's artifact or from a converted one."""
        spec = [] if loaded == "low" else ["--spec", "megatron_lowbit.adapters.megatron", "llama_lowbit_spec"]
        environment = {} if loaded == "low" else {"MEGATRON_LOWBIT_ARTIFACT": str(artifact)}
        folder = checkpoints[loaded]
        sizes = ["--tensor-model-parallel-size", tp, "--num-tokens-to-generate", 16, "--inference-max-seq-length", 64]
        given = [*options(folder), *spec, *sizes, "--load", folder, "--top_k", 1, "--prompts", *PROMPTS]
        given += DYNAMIC.split() if batching == "dynamic" else []
        script = f"gpt_{batching}_inference.py"
        run_script(script, *given, "--output-path", tmp_path / "text.json", ranks=tp, **environment)
        found = json.loads((tmp_path / "text.json").read_text())
        results = [result for result in found.values() if isinstance(result, dict)]
        texts = {result["input_prompt"]: result["generated_tokens"] for result in results}
        assert texts == continued(artifact, tp)

    @pytest.mark.parametrize(("tp", "optimizer"), [(1, []), (2, []), (1, ["--use-distributed-optimizer"])])
    def test_train_save_and_resume(self, checkpoints, tmp_path, tp, optimizer):
        """Through the rounding, on Megatron's mock data; the second run goes on where the first has saved.

        Without Apex or Transformer Engine the state of Megatron's distributed optimizer is saved, but never loaded.
        """
        folder = checkpoints["full"]
        shape = options(folder)
        shape = shape[: shape.index("--tokenizer-type")]
        given = [*shape, "--spec", "megatron_lowbit.adapters.megatron", "llama_lowbit_spec", *TRAINING.split()]
        given += [*optimizer, "--tensor-model-parallel-size", tp, "--save", tmp_path, "--train-iters", 3]
        first = run_script("pretrain_gpt.py", *given, "--exit-interval", 2, ranks=tp)
        assert "rounded in every forward pass" in first and (tmp_path / "iter_0000002").is_dir()
        if optimizer:
            return
        second = run_script("pretrain_gpt.py", *given, "--load", tmp_path, ranks=tp)
        assert "successfully loaded checkpoint" in second and (tmp_path / "iter_0000003").is_dir()
