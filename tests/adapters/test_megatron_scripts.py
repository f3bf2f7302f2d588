"""Megatron-LM's own scripts, unchanged, on CPUs. MEGATRON_LM names the folder of its repository, which is no part of
this one; without it, or without the packages that its scripts import, they are skipped."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import megatron_unit_tests
import pytest
import torch
import transformers
from commands import needs_megatron, run_here, started
from forked import forked
from host_unit_tests import compare
from megatron_scripts import ON_CPU, PROMPTS, ROOT, WHY, continued, find_script, generated, options, real
from ports import free_port
from tiny_models import embedded_folder, save_model

from megatron_lowbit.adapters import megatron_script_on_cpu

TRAINING = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 1023 --seq-length 64 --global-batch-size 2 --lr 1e-4
    --lr-decay-style constant --eval-iters 0 --eval-interval 100 --log-interval 1 --num-workers 0 --save-interval 100
    --no-create-attention-mask-in-dataloader --no-save-rng --no-load-rng
"""
DYNAMIC = """
    --inference-dynamic-batching-buffer-size-gb 0.01 --inference-dynamic-batching-max-requests 4
    --inference-dynamic-batching-block-size 64
"""
# {script: (method, route, body of a request, its own options)}
SERVERS: dict[str, tuple[Any, ...]] = {
    "run_text_generation_server.py": ("PUT", "/api", {"prompts": PROMPTS, "tokens_to_generate": 16, "top_k": 1}),
    "launch_inference_server.py": (
        "POST",
        "/v1/completions",
        {"prompt": PROMPTS, "max_tokens": 16, "temperature": 0, "ignore_eos": True},
        *("--host", "127.0.0.1", "--coordinator-host", "127.0.0.1", "--frontend-replicas", 1),
        *DYNAMIC.split(),
    ),
}


@pytest.mark.parametrize("argv", [[], ["pretrain_gpt.py"]])
def test_a_script_needs_its_repository(monkeypatch, tmp_path, argv):
    monkeypatch.setenv("MEGATRON_LM", str(tmp_path))
    with pytest.raises(SystemExit, match="set MEGATRON_LM to Megatron-LM's folder"):
        megatron_script_on_cpu.main(argv)


@needs_megatron
def test_activations_are_recomputed_without_a_gpu():
    """Megatron's checkpoint() keeps the GPU's random state."""

    def gradient() -> None:
        with megatron_script_on_cpu._no_gpu():
            from megatron.core.tensor_parallel import random

            x = torch.tensor([1.0, 2.0], requires_grad=True)
            random.checkpoint(lambda x: x.sin() * x, False, x).sum().backward()
            torch.testing.assert_close(x.grad, x.cos() * x + x.sin())

    with forked(gradient) as child:  # it changes torch.cuda for good
        code, printed = child.finish()
    assert code == 0, printed


@needs_megatron
@pytest.mark.slow
@pytest.mark.skipif(ROOT is None, reason=WHY)
def test_its_own_unit_tests_pass_on_our_layers():
    """The same as without them, in full precision and rounded."""
    assert (
        compare(["transformer/test_transformer_block.py"], megatron_unit_tests.VARIANTS, megatron_unit_tests.run) == 0
    )


@contextlib.contextmanager
def ranks_of_script(
    name: str, *arguments: object, ranks: int, settings: str = ON_CPU, **environment: str
) -> Iterator[tuple[list[Any], Path]]:
    """A script's processes, and the file that rank 0 prints into; what still runs at the end is killed."""
    # Its makefile asks python3 where pybind11 is, and a python3-config, which may be another's, for the suffix.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment |= {"PATH": path, "MAKEFLAGS": f"LIBEXT={sysconfig.get_config_var('EXT_SUFFIX')}"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", "megatron_lowbit.adapters.megatron_script_on_cpu", find_script(name)]
    words = ["sh", "-c", 'exec "$@" >"$PRINTED" 2>&1', "sh", *command, *settings.split(), *arguments]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        running = []
        for rank in map(str, range(ranks)):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "PRINTED": f"{folder}/{rank}"}
            running.append(stack.enter_context(started(*words, **environment, **numbers)))
        yield running, Path(folder) / "0"


def run_script(name: str, *arguments: object, ranks: int = 1, **others: str) -> str:
    """Run a script on its ranks to its end; returns what rank 0 has printed."""
    with ranks_of_script(name, *arguments, ranks=ranks, **others) as (running, output):
        codes = [process.wait(timeout=1800) for process in running]
        printed = output.read_text()
    assert codes == [0] * ranks, printed[-4000:]
    return printed


def ask(method: str, url: str, body: dict[str, Any], running: list[Any], output: Path) -> dict[str, Any]:
    """The answer of a server that is starting."""
    while all(process.poll() is None for process in running):
        try:
            answer = httpx.request(method, url, json=body, timeout=300)
        except httpx.ConnectError:
            time.sleep(0.5)
            continue
        assert answer.status_code == 200, answer.text
        return answer.json()
    raise AssertionError(output.read_text()[-4000:])


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
        assert generated(tmp_path / "text.json") == continued(artifact, tp)

    @pytest.mark.parametrize(("architecture", "tp"), [("mixtral", 1), ("mixtral", 2), ("qwen2_moe", 2)])
    def test_a_mixture_of_experts(self, tmp_path, architecture, tp):
        """Its experts in codes, from a converted artifact."""
        model, artifact = save_model(architecture, tmp_path / "model"), tmp_path / "artifact"
        schemes = ["weights.scheme=W8A8", "weights.experts=W8A8", "weights.method=rtn"]
        assert run_here("quantize", f"model={model}", *schemes, f"output_dir={artifact}") == 0
        assert run_here("convert", f"artifact={artifact}", f"output_dir={tmp_path}") == 0
        folder = tmp_path / "megatron"
        given = [*options(folder), "--tensor-model-parallel-size", tp, "--load", folder, *DYNAMIC.split()]
        given += ["--top_k", 1, "--num-tokens-to-generate", 16, "--inference-max-seq-length", 64, "--prompts", *PROMPTS]
        run_script("gpt_dynamic_inference.py", *given, "--output-path", tmp_path / "text.json", ranks=tp)
        assert generated(tmp_path / "text.json") == continued(artifact, tp, folder=model)

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

    @pytest.mark.skipif(find_script("offline_inference.py") is None, reason="this version has no MegatronLLM")
    @pytest.mark.parametrize(("tp", "how"), [(1, ""), (2, "--use-coordinator"), (2, "--use-coordinator --async-mode")])
    def test_offline_inference(self, artifact, checkpoints, tmp_path, tp, how):
        """MegatronLLM alone, with its coordinator, and MegatronAsyncLLM."""
        folder = checkpoints["low"]
        given = [*options(folder), "--tensor-model-parallel-size", tp, "--load", folder, *f"{DYNAMIC} {how}".split()]
        given += ["--top_k", 1, "--num-tokens-to-generate", 16, "--inference-max-seq-length", 64, "--prompts", *PROMPTS]
        run_script("offline_inference.py", *given, "--output-path", tmp_path / "text.json", ranks=tp)
        assert generated(tmp_path / "text.json") == continued(artifact, tp)

    @pytest.mark.parametrize("name", SERVERS)
    def test_server(self, artifact, checkpoints, name):
        """Two ranks answer over HTTP, until they are killed."""
        newer = name.startswith("run_") and find_script("launch_inference_server.py")  # it lacks an argument there
        if find_script(name) is None or newer:
            pytest.skip("another version's server")
        folder, port = checkpoints["low"], free_port()
        method, route, body, *own = SERVERS[name]
        given = [*options(folder), "--tensor-model-parallel-size", 2, "--load", folder, "--port", port, *own]
        with ranks_of_script(name, *given, "--inference-max-seq-length", 64, ranks=2) as (running, output):
            answer = ask(method, f"http://127.0.0.1:{port}{route}", body, running, output)
        made = answer["text"] if "text" in answer else [choice["text"] for choice in answer["choices"]]
        tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_folder())
        expected = [tokenizer.decode(tokens) for tokens in continued(artifact, 2, begins=True).values()]
        assert [text.removeprefix(prompt) for text, prompt in zip(made, PROMPTS, strict=True)] == expected

    def test_checkpoint_inspector(self, checkpoints):
        """It lists the packed weights as it lists any tensor."""
        said = run_script("checkpoint_inspector.py", "inspect", checkpoints["low"] / "release", settings="")
        assert "decoder.layers.mlp.linear_fc1.packed_weight [torch.uint8" in said
