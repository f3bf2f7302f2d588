"""calibrate, quantize, evaluate and generate with engine=megatron: the artifacts, figures and tokens of the others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import megatron_command_cases as cases
import pytest
import torch
from commands import CALIBRATION, COMMAND, EVALUATION, needs_deepspeed, needs_megatron, run_here, run_there
from ports import free_port
from rank_pool import RankPool
from safetensors.torch import load_file
from slow_cases import slow
from tiny_models import build, save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.plan import CalibrationStats

pytestmark = needs_megatron

MODEL = "model=embedded"
# With the ranges of CALIBRATION's text one token is so near a tie that the order of paged attention's sums decides it.
GATHER = [*CALIBRATION, "calibration.data=stdlib:calibration", "comm.tp_sizes=[2,4]", "comm.gather=true"]
QUANTIZE = ["quantize", MODEL, "weights.method=rtn", "weights.scheme=W4A8", *GATHER]
PROMPTS = ["def read_lines(path):", "import os", "class Queue:", "for i in range("]


@pytest.fixture(scope="module")
def ranks():
    """Two ranks for commands; not the session's, whose groups the commands would close."""
    pool = RankPool(2)

    def run(*argv: object) -> tuple[int, str, str]:
        """Rank 0's outcome."""
        first, second = pool.run(cases.command, free_port(), *map(str, argv))
        assert first[0] == second[0] and second[1] == "", "rank 1 had its say"
        return first

    yield run
    pool.close()


def succeed(outcome: tuple[int, str, str]) -> str:
    code, out, err = outcome
    assert code == 0, err
    return out


def record(folder: Path, stage: str) -> dict:
    return json.loads((folder / f"{stage}.json").read_text())


def rows(folder: Path, stage: str = "evaluate") -> dict[str, dict]:
    return {row["name"]: row for row in record(folder, stage)["rows"]}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """Quantized and calibrated by one Hugging Face process; all engines run it."""
    folder = tmp_path_factory.mktemp("huggingface")
    assert run_here(*QUANTIZE, f"output_dir={folder}") == 0
    return folder


# calibrate and quantize


def assert_same_plans(folder: Path, reference: Path, sizes: tuple[int, ...] = (2, 4)) -> None:
    """Ranges are float32 sums in another order; which features travel in bf16 is decided by them, not by rounding."""
    stats, expected = CalibrationStats.load(folder), CalibrationStats.load(reference)
    assert set(stats.ranges) == {1, *sizes} and stats.fingerprint == expected.fingerprint
    for size, sites in stats.ranges.items():
        assert list(sites) == list(expected.ranges[size]) and len(sites) == (12 if size > 1 else 24)
        for name, measured in sites.items():
            wanted = expected.ranges[size][name]
            largest = max(wanted.min_vals.abs().max().item(), wanted.max_vals.abs().max().item())
            for mine, theirs in ((measured.min_vals, wanted.min_vals), (measured.max_vals, wanted.max_vals)):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * largest)
    plans, references = Artifact.load(folder).plans, Artifact.load(reference).plans
    assert sorted(plans) == sorted(references) == list(sizes)
    for size in sizes:
        assert plans[size].description == references[size].description
        for kind in ("sites", "gathers"):
            mine, theirs = getattr(plans[size], kind), getattr(references[size], kind)
            assert list(mine) == list(theirs) and len(mine) == 12
            for name, plan in theirs.items():
                own, other = (plan if kind == "gathers" else plan.first for plan in (mine[name], plan))
                assert torch.equal(own.bits, other.bits)
                torch.testing.assert_close(own.scale, other.scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "layout", [slow(["tp=2"]), slow(["pp=2"]), slow(["dp=2"]), ["tp=2", "sequence_parallel=true"]], ids=" ".join
)
def test_calibrate_on_any_layout(ranks, artifact, tmp_path, layout):
    """Shards, stages, halves of the windows and halves of their tokens: the ranges of one process that has it all."""
    out = succeed(ranks("calibrate", MODEL, "engine=megatron", *layout, *GATHER, f"output_dir={tmp_path}"))
    assert out.count("wrote the plan for tp_size 2: 12 sites, per-token tiered int4") == 1
    assert_same_plans(tmp_path, artifact)


@pytest.mark.slow
def test_quantize_on_four_ranks(artifact, tmp_path):
    """Started as a user starts it; all kinds of parallelism at once. The codes are Hugging Face's, bit for bit."""
    layout = ["engine=megatron", "tp=2", "pp=2", "sequence_parallel=true"]
    code, out, err = run_there(*COMMAND, *QUANTIZE, *layout, f"output_dir={tmp_path}")
    assert code == 0, err
    assert "42 linears in W4A8" in out and out.count("wrote the plan") == 2
    assert_same_plans(tmp_path, artifact)
    mine, theirs = (load_file(folder / "lowbit.safetensors") for folder in (tmp_path, artifact))
    assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    config, reference = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, artifact))
    assert {**config, "dtype": None} == {**reference, "dtype": None}
    assert record(tmp_path, "quantize")["rows"][0] == record(artifact, "quantize")["rows"][0]


# evaluate

LOW_BIT = "W4A8 + per-token tiered int4"


@pytest.fixture(scope="module")
def evaluated(artifact, tmp_path_factory):
    """{what: rows of evaluate.json}: virtual ranks of Hugging Face, and real ones of Megatron."""
    root = tmp_path_factory.mktemp("evaluate")
    use = ["evaluate", MODEL, f"artifact={artifact}", *EVALUATION]
    assert run_here(*use, "virtual_tp=2", f"output_dir={root / 'huggingface'}") == 0
    code, out, err = run_there(*COMMAND, *use, "engine=megatron", "tp=2", f"output_dir={root / 'megatron'}")
    assert code == 0, err
    assert out.count("perplex-") == 1, "more than one rank prints the table"
    return {name: rows(root / name) for name in ("huggingface", "megatron")}


def assert_same_figures(real: dict[str, dict], virtual: dict[str, dict]) -> None:
    """Full precision: float32 sums in another order. With the artifact a value may fall on the other side of a rounding
    boundary and take the next of 256 codes (activations) or 16 (messages), as in test_launch.py: a few of the 252
    tokens move by about 1e-2, the mean of them by less than 1e-4."""
    assert list(real) == list(virtual) == ["full precision", LOW_BIT]
    for name, tolerance in (("full precision", 1e-5), (LOW_BIT, 1e-4)):
        assert real[name]["perplexity"] == pytest.approx(virtual[name]["perplexity"], rel=tolerance), name
        assert real[name]["tokens"] == virtual[name]["tokens"] == 4 * 63 and real[name]["tp"] == 2
    mine, theirs = real[LOW_BIT], virtual[LOW_BIT]
    assert mine["kl"] == pytest.approx(theirs["kl"], rel=0.02, abs=1e-6)
    assert mine["bits_per_value"] == theirs["bits_per_value"] <= 4.1875
    assert mine["bytes_per_token"] == theirs["bytes_per_token"] <= 12 * 67
    assert list(mine["sites"]) == list(theirs["sites"]) and len(mine["sites"]) == 12
    for name, decibels in mine["sites"].items():
        assert decibels == pytest.approx(theirs["sites"][name], abs=0.1), name


def test_evaluate_gives_the_figures_of_virtual_ranks(evaluated):
    assert_same_figures(evaluated["megatron"], evaluated["huggingface"])
    assert evaluated["megatron"][LOW_BIT]["perplexity"] != evaluated["megatron"]["full precision"]["perplexity"]


@needs_deepspeed
def test_evaluate_gives_the_figures_of_deepspeed(ranks, evaluated, artifact, tmp_path):
    use = ["evaluate", MODEL, f"artifact={artifact}", *EVALUATION, f"output_dir={tmp_path}"]
    succeed(ranks(*use, "engine=deepspeed", "tp=2"))
    assert_same_figures(evaluated["megatron"], rows(tmp_path))


def test_evaluate_an_artifact_without_its_model(ranks, artifact, tmp_path):
    """Pipeline stages: no rank sees more than three of the six blocks, and none the full-precision weights."""
    use = ["evaluate", f"artifact={artifact}", *EVALUATION]
    succeed(ranks(*use, "engine=megatron", "pp=2", f"output_dir={tmp_path / 'megatron'}"))
    assert run_here(*use, f"output_dir={tmp_path / 'huggingface'}") == 0
    (row,), (expected,) = (rows(tmp_path / name).values() for name in ("megatron", "huggingface"))
    assert row["name"] == expected["name"] == "W4A8"
    assert row["kl"] is row["sqnr_db"] is row["bits_per_value"] is None
    assert row["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)  # see assert_same_figures


def test_evaluate_with_a_low_bit_all_gather(ranks, evaluated, artifact, tmp_path):
    """Sequence parallelism gathers the normed activations in 4 bits too; that costs something, but not the model."""
    use = ["evaluate", MODEL, f"artifact={artifact}", *EVALUATION, f"output_dir={tmp_path}"]
    succeed(ranks(*use, "engine=megatron", "tp=2", "sequence_parallel=true"))
    gathered, without = rows(tmp_path), evaluated["megatron"]
    assert gathered["full precision"]["perplexity"] == pytest.approx(without["full precision"]["perplexity"], rel=1e-5)
    assert gathered[LOW_BIT]["perplexity"] != pytest.approx(without[LOW_BIT]["perplexity"], rel=1e-3), "not quantized"
    assert gathered[LOW_BIT]["perplexity"] == pytest.approx(without[LOW_BIT]["perplexity"], rel=0.5)


# generate


@pytest.fixture(scope="module")
def generation(artifact, tmp_path_factory) -> tuple[list[str], list[list[int]]]:
    """(command line, Hugging Face's tokens on virtual ranks)."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "prompts.txt").write_text("\n\n".join([*PROMPTS, "  ", ""]))
    use = ["generate", MODEL, f"artifact={artifact}", f"prompts={folder / 'prompts.txt'}", "max_new_tokens=8"]
    assert run_here(*use, "virtual_tp=2", f"output_dir={folder}") == 0
    written = record(folder, "generate")["rows"]
    assert [row["prompt"] for row in written] == PROMPTS, "empty lines are no prompts"
    return use, [row["tokens"] for row in written]


@pytest.mark.parametrize(
    "engine",
    [
        ["engine=megatron", "max_batch=3"],
        ["engine=megatron", "batching=static"],
        pytest.param(["engine=deepspeed"], marks=needs_deepspeed),
    ],
    ids=["dynamic", "static", "deepspeed"],
)
def test_generate_the_same_tokens_everywhere(ranks, generation, tmp_path, engine):
    use, expected = generation
    out = succeed(ranks(*use, *engine, "tp=2", f"output_dir={tmp_path}"))
    written = record(tmp_path, "generate")["rows"]
    assert [row["tokens"] for row in written] == expected
    assert [row["name"] for row in written] == [LOW_BIT] * 4 and [row["prompt"] for row in written] == PROMPTS
    records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert records == [{"prompt": row["prompt"], "text": row["text"]} for row in written]


# A mixture of experts


@pytest.mark.slow
def test_experts_in_codes(ranks, tmp_path):
    """Quantized and calibrated by Megatron's ranks, it gives the figures and tokens of Hugging Face's virtual ones."""
    model, artifact = f"model={save_model('mixtral', tmp_path / 'model')}", tmp_path / "artifact"
    scheme = ["weights.method=rtn", "weights.scheme=W8A8", "weights.experts=W8A8", *CALIBRATION, "comm.tp_sizes=[2]"]
    out = succeed(ranks("quantize", model, *scheme, "engine=megatron", "tp=2", f"output_dir={artifact}"))
    assert "experts in W8A8" in out and "wrote the plan for tp_size 2: 2 sites" in out
    use = [model, f"artifact={artifact}"]
    evaluate, generate = ["evaluate", *use, *EVALUATION], ["generate", *use, "prompt=import os", "max_new_tokens=8"]
    for stage in (evaluate, generate):
        assert run_here(*stage, "virtual_tp=2", f"output_dir={tmp_path / 'huggingface'}") == 0
        succeed(ranks(*stage, "engine=megatron", "tp=2", f"output_dir={tmp_path / 'megatron'}"))
    real, virtual = (rows(tmp_path / name) for name in ("megatron", "huggingface"))
    assert list(real) == list(virtual) == ["full precision", "W8A8 + per-token tiered int4"]
    for name, row in real.items():  # see assert_same_figures
        assert row["perplexity"] == pytest.approx(virtual[name]["perplexity"], rel=1e-4)
    (row,), (expected,) = (record(tmp_path / name, "generate")["rows"] for name in ("megatron", "huggingface"))
    assert row["tokens"] == expected["tokens"]


# Bad input: exit code 2, one line, nothing written

EVALUATE = ["evaluate", MODEL, *EVALUATION]
GENERATE = ["generate", MODEL, "max_new_tokens=2"]
# {what is wrong: (command line, what the line has to say)}; `{folder}` holds prepared files
CASES = {
    "pp without Megatron": ([*EVALUATE, "pp=2"], ["pp=2", "engine=megatron"]),
    "pp with DeepSpeed": ([*EVALUATE, "engine=deepspeed", "tp=2", "pp=2"], ["pp=2", "engine=megatron"]),
    "sequence_parallel without Megatron": (
        [*EVALUATE, "engine=deepspeed", "tp=2", "sequence_parallel=true"],
        ["sequence_parallel=True", "engine=megatron"],
    ),
    "dp without Megatron": (
        ["calibrate", MODEL, *CALIBRATION, "engine=deepspeed", "tp=2", "dp=2"],
        ["dp=2", "engine=megatron"],
    ),
    "virtual ranks with Megatron": ([*EVALUATE, "engine=megatron", "virtual_tp=2"], ["virtual_tp=2", "huggingface"]),
    "other number of processes": (
        [*EVALUATE, "engine=megatron", "tp=2", "pp=2", "--nproc", "3"],
        ["tp=2 x pp=2 needs 4 processes, there are 3"],
    ),
    "no prompts": ([*GENERATE, "prompts={folder}/blank.txt"], ["blank.txt", "no prompts"]),
    "prompts missing": ([*GENERATE, "prompts={folder}/none.txt"], ["none.txt", "No such file"]),
    "prompts are no text": ([*GENERATE, "prompts={folder}/binary.txt"], ["binary.txt"]),
    "one prompt too long": ([*GENERATE, "prompts={folder}/long.txt"], ["256", "shorten"]),
    "prompt of spaces alone": (
        ["generate", "model={folder}/words", "prompt=  ", "max_new_tokens=2"],
        ["has no tokens"],
    ),
    "unknown word": (
        ["generate", "model={folder}/words", "prompt=read a xylophone", "max_new_tokens=2"],
        ["no token for 'xylophone'", "leave it out"],
    ),
    "batching of another kind": ([*GENERATE, "batching=clever"], ["batching='clever'", "static"]),
    "nobody in flight": ([*GENERATE, "max_batch=0"], ["max_batch=0"]),
}
# The same, found out by the ranks together.
RANKS_CASES = {
    "pp and layers": (
        ["evaluate", "model={folder}/layers", *EVALUATION, "pp=2"],
        ["pp=2", "num_hidden_layers=3"],
    ),
    "tp and the MLP": (
        ["evaluate", "model={folder}/odd", *EVALUATION, "tp=2"],
        ["tp=2 does not divide the model's intermediate_size=171; choose one of [1]"],
    ),
    "another architecture": (
        ["evaluate", "model={folder}/gemma2", *EVALUATION, "tp=2"],
        ["model_type 'gemma2' is not supported with engine=megatron", "llama", "engine=huggingface or deepspeed"],
    ),
    "static batching and sequence parallelism": (
        [*GENERATE, "tp=2", "sequence_parallel=true", "batching=static"],
        ["sequence_parallel=true", "batching=dynamic"],
    ),
    "unknown word": (
        ["generate", "model={folder}/words", "prompt=read a xylophone", "max_new_tokens=2", "tp=2"],
        ["no token for 'xylophone'"],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bad-input")
    save_model("llama", root / "layers", num_hidden_layers=3)
    save_model("llama", root / "odd", intermediate_size=171)
    save_model("gemma2", root / "gemma2")
    build("llama", vocab_size=16).save_pretrained(root / "words")
    words = ["<unk>", "<s>", "</s>", "read", "a", "line"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(root / "words")
    (root / "blank.txt").write_text(" \n\n")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
    (root / "long.txt").write_text("short\n" + "word " * 300)
    return root


def only_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("megatron-lowbit: ") and "Traceback" not in stderr, stderr
    return lines[0]


def assert_refused(line: str, said: list[str], output: Path) -> None:
    assert all(part in line for part in said), line
    left = {file.name for file in output.rglob("*") if file.is_file()} if output.is_dir() else set()
    assert left <= {"metrics.jsonl"}, left


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, folder, tmp_path, capsys):
    command, said = CASES[case]
    arguments = [argument.format(folder=folder) for argument in command]
    assert run_here(*arguments, f"output_dir={tmp_path / 'output'}") == 2
    assert_refused(only_line(capsys.readouterr().err), said, tmp_path / "output")


@pytest.mark.parametrize("case", RANKS_CASES)
def test_bad_input_of_ranks(ranks, case, folder, tmp_path):
    command, said = RANKS_CASES[case]
    arguments = [argument.format(folder=folder) for argument in [*command, "engine=megatron"]]
    code, out, err = ranks(*arguments, f"output_dir={tmp_path / 'output'}")
    assert (code, out) == (2, "")
    assert_refused(only_line(err), said, tmp_path / "output")


def test_an_unknown_word_that_is_meant(folder, tmp_path):
    """Whoever writes the unknown token itself gets it."""
    arguments = ["generate", f"model={folder / 'words'}", "prompt=read <unk> line", "max_new_tokens=2"]
    assert run_here(*arguments, f"output_dir={tmp_path}") == 0
    (row,) = record(tmp_path, "generate")["rows"]
    assert 1 <= row["new_tokens"] <= 2


def test_megatron_missing(tmp_path):
    """Two ranks of a machine without megatron-core: one line from both together."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['megatron'] = None\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = [*EVALUATE, "engine=megatron", "tp=2", f"output_dir={tmp_path / 'output'}"]
    code, out, err = run_there(*COMMAND, *arguments, PYTHONPATH=path)
    assert (code, out) == (2, "")
    line = only_line(err)
    assert_refused(line, ["megatron", "pip install 'megatron-lowbit[megatron]'"], tmp_path / "output")
