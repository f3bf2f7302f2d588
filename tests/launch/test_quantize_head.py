"""weights.lm_head_bits in the commands: what is written, measured and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from commands import COMMAND, needs_megatron, run_here, run_there
from tiny_models import save_artifact, save_model, token_ids

from megatron_lowbit.adapters.huggingface.head import quantize_head
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import LowBitError
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.head import KL_LIMIT, first_tokens
from megatron_lowbit.runtime.metrics import read_metrics

TEXT = [
    *("calibration.data=stdlib:calibration", "calibration.samples=4", "calibration.sequence_length=32"),
    *("calibration.batch_size=2", "comm.tp_sizes=[2]"),
]
QLLM = [*TEXT, "reassembly.mode=none", "correction.mode=none", "correction.blocks_per_group=1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


def quantize(model: Path, folder: Path, *settings: str) -> int:
    return run_here("quantize", f"model={model}", "weights.scheme=W4A8", f"output_dir={folder}", *settings)


def head_of(folder: Path) -> dict:
    return json.loads((folder / "lowbit.json").read_text())["head"]


def one_line(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("megatron-lowbit: ")]
    return line


def test_rtn_and_qllm_measure_the_same(model, tmp_path, capsys):
    """They read the same windows; method qllm reads the hidden states from its stream of full precision."""
    found = {}
    for method, settings in (("rtn", TEXT), ("qllm", QLLM)):
        folder = tmp_path / method
        assert quantize(model, folder, f"weights.method={method}", "weights.lm_head_bits=8", *settings) == 0
        said = capsys.readouterr().out
        assert "lm_head and the embedding in 8 bits (KL " in said
        assert said.count("calibration.data=stdlib:calibration: ") == 1, "the text is read, and told of, once"
        about = found[method] = head_of(folder)
        assert about["embedding"] == "model.embed_tokens" and 0 < about["kl"] < KL_LIMIT
        logged = [r for r in read_metrics(folder / "metrics.jsonl") if "lm_head_kl" in r]
        assert [(r["lm_head_kl"], r["lm_head_tokens"]) for r in logged] == [(about["kl"], about["tokens"])]
        assert json.loads((folder / "quantize.json").read_text())["rows"][0]["lm_head"] == about
        checkpoint = LowBitCheckpoint.load(folder)
        assert not any("embed" in name or "lm_head" in name for name in checkpoint.tensors)
    # float32 hidden states, the same but for the batches they are computed in.
    assert found["qllm"].pop("kl") == pytest.approx(found["rtn"].pop("kl"), rel=1e-3)
    assert found["qllm"] == found["rtn"]


def test_data_parallel_ranks_write_the_same_files(model, tmp_path):
    settings = [*QLLM, "weights.lm_head_bits=8", "weights.method=qllm"]
    assert quantize(model, tmp_path / "one", *settings) == 0
    command = ["quantize", f"model={model}", "weights.scheme=W4A8", f"output_dir={tmp_path / 'two'}", *settings, "dp=2"]
    code, _, stderr = run_there(*COMMAND, *command)
    assert code == 0, stderr
    one, two = (json.loads((tmp_path / name / "lowbit.json").read_text()) for name in ("one", "two"))
    assert one.pop("beside") and two.pop("beside")
    assert {**one, "json_sha256": 0} == {**two, "json_sha256": 0}


def test_a_refused_run_goes_on_with_other_bits(model, tmp_path, capsys):
    """The blocks, which took the hours, are not quantized again."""
    assert quantize(model, tmp_path, *QLLM, "weights.lm_head_bits=2") == 2
    message = one_line(capsys.readouterr().err)
    assert "weights.lm_head_bits=2 costs a KL divergence of " in message and "raise it to 8, or leave it out" in message
    assert not (tmp_path / "lowbit.json").exists()
    assert quantize(model, tmp_path, *QLLM, "weights.lm_head_bits=8") == 0
    assert "continuing after 2 of the block groups" in capsys.readouterr().out
    assert head_of(tmp_path)["bits"] == 8
    assert quantize(model, tmp_path, *QLLM) == 0
    meta = json.loads((tmp_path / "lowbit.json").read_text())
    assert meta["format"] == 4 and "head" not in meta


@pytest.mark.parametrize(
    "command, said",
    [
        (["quantize", "weights.method=rtn"], "is measured on text, by its KL divergence; set calibration.data"),
        (["quantize", "weights.method=rtn", *TEXT, "engine=deepspeed", "tp=1"], "which engine=deepspeed splits"),
        (["evaluate", "evaluation.data=stdlib:validation", *TEXT], "would have no effect: it needs a weights.scheme"),
        (["evaluate", "--ablation", "evaluation.data=stdlib:validation", "weights.scheme=W4A4", *TEXT], "--ablation"),
        (["generate", "weights.scheme=W4A8", "artifact={artifact}"], "would have no effect: the artifact decides it"),
        (["quantize", "weights.lm_head_bits=9"], "weights.lm_head_bits=9"),
    ],
    ids=["no text", "engine", "no scheme", "ablation", "artifact", "nine"],
)
def test_bad_input(model, tmp_path, capfd, command, said):
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "lowbit.json").write_text("{}")
    given = [argument.format(artifact=tmp_path / "artifact") for argument in command]
    bits = [] if any("lm_head_bits" in argument for argument in given) else ["weights.lm_head_bits=8"]
    assert run_here(*given[:1], f"model={model}", f"output_dir={tmp_path}", *bits, *given[1:]) == 2
    assert said in one_line(capfd.readouterr().err)


def test_evaluate_and_generate_make_one(model, tmp_path, capsys):
    settings = [f"model={model}", "weights.scheme=W4A8", "weights.lm_head_bits=8", *TEXT, f"output_dir={tmp_path}"]
    text = ["evaluation.data=stdlib:validation", "evaluation.samples=2", "evaluation.sequence_length=32"]
    kls = []
    for bits in ("8", "0"):
        assert run_here("evaluate", *settings, f"weights.lm_head_bits={bits}", *text) == 0
        kls.append(json.loads((tmp_path / "evaluate.json").read_text())["rows"][1]["kl"])
    assert kls[0] != kls[1], "the projection stayed as it was"
    assert run_here("generate", *settings, "max_new_tokens=3") == 0


def test_a_dry_run_counts_it(model, tmp_path):
    other = []
    for bits in (0, 8):
        assert quantize(model, tmp_path, "dry_run=true", *QLLM, f"weights.lm_head_bits={bits}") == 0
        other.append(json.loads((tmp_path / "quantize.json").read_text())["rows"][-1]["other_bytes"])
    assert other[0] - other[1] == 1024 * (2 * 64 - 64 - 8)


@needs_megatron
def test_megatron_refuses_it(model, tmp_path):
    from tiny_models import build, make_artifact

    from megatron_lowbit.adapters.megatron.apply import refuse_head
    from megatron_lowbit.adapters.megatron.model import load_rest
    from megatron_lowbit.adapters.megatron.spec import llama_spec, lowbit_spec
    from megatron_lowbit.config import WeightsConfig

    llama = build("llama")
    artifact, ids = make_artifact(llama, "W4A8"), token_ids(2, 20)
    refuse_head(artifact)
    refuse_head(Artifact())
    assert artifact.checkpoint is not None
    quantized = quantize_head(llama, artifact.checkpoint, 8, first_tokens(ids, ids > 0))
    folder = save_artifact(replace(artifact, checkpoint=quantized), tmp_path)
    said = "the artifact holds lm_head in 8 bits, .*; quantize again without weights.lm_head_bits"
    for refused in (refuse_head, lambda found: load_rest(None, found, None)):
        with pytest.raises(LowBitError, match=said):
            refused(Artifact.load(folder))
    with pytest.raises(LowBitError, match="lm_head_bits has no effect on a spec"):
        lowbit_spec(llama_spec(), WeightsConfig(scheme="W4A8", lm_head_bits=8))
