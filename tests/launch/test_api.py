"""The commands as functions: the same files and figures as the commands, tables, models in memory, and bad input."""

import json
from pathlib import Path

import api_cases
import pytest
import torch
from commands import needs_deepspeed, run_here
from quantize_runs import checksums
from tiny_models import embedded_folder, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatron_lowbit as lowbit
from megatron_lowbit.launch.api import StageResult

LOOK = {"samples": 2, "sequence_length": 32}
TIMES = {"evaluate_seconds"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory) -> StageResult:
    """Quantized by QLLM on a little text, with a plan for two ranks."""
    return lowbit.quantize(
        model,
        "stdlib:calibration",
        "W4A8",
        tmp_path_factory.mktemp("artifact"),
        calibration=LOOK,
        **{"correction.epochs": 1, "correction.batch_size": 2, "comm.tp_sizes": [2]},
    )


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_the_artifact_is_the_command_s(model, quantized, tmp_path):
    text = ["calibration.data=stdlib:calibration", *(f"calibration.{key}={value}" for key, value in LOOK.items())]
    settings = ["correction.epochs=1", "correction.batch_size=2", "comm.tp_sizes=[2]"]
    assert (
        run_here("quantize", f"model={model}", "weights.scheme=W4A8", *text, *settings, f"output_dir={tmp_path}") == 0
    )
    assert checksums(tmp_path) == checksums(quantized.folder)
    assert quantized.artifact().plan(2).tp_size == 2
    record = json.loads((quantized.folder / "quantize.json").read_text())
    assert record["rows"] == quantized.rows == quantized.record["rows"]


def test_an_evaluation_is_the_command_s(model, quantized, tmp_path, capsys):
    found = lowbit.evaluate(
        model, "stdlib:validation", quantized.folder, tmp_path / "one", evaluation=LOOK, virtual_tp=2
    )
    assert capsys.readouterr().out == "", "standard output belongs to the caller"
    options = ["evaluation.data=stdlib:validation", *(f"evaluation.{key}={value}" for key, value in LOOK.items())]
    about = [f"model={model}", f"artifact={quantized.folder}", "virtual_tp=2", f"output_dir={tmp_path / 'other'}"]
    assert run_here("evaluate", *about, *options) == 0
    other = json.loads((tmp_path / "other" / "evaluate.json").read_text())["rows"]
    assert without_times(found.rows) == without_times(other) and len(other) == 2


@needs_deepspeed
def test_every_rank_of_a_launched_script_calls_it(model, quantized, two_ranks, tmp_path):
    first, second = two_ranks.run(api_cases.evaluated, model, quantized.folder, tmp_path, LOOK)
    assert first["record"]["rows"] == first["rows"] and second["record"] == {}
    assert [row["name"] for row in second["rows"]] == [row["name"] for row in first["rows"]]
    assert [row["tp"] for row in first["rows"]] == [2, 2]
    assert json.loads((tmp_path / "evaluate.json").read_text())["config"]["tp"] == 2


def test_a_model_in_memory_is_quantized_and_left_as_it_is(model, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(model)
    one = lowbit.quantize(whole, scheme="W4A16", output_dir=tmp_path / "one", tokenizer=tokenizer)
    other = lowbit.quantize(model, scheme="W4A16", output_dir=tmp_path / "other")
    assert checksums(one.folder) == checksums(other.folder)
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in before.items())
    assert not Path(one.record["config"]["model"]).exists(), "the copy is gone"


def test_plans_and_text(model, tmp_path):
    plans = lowbit.calibrate(model, "stdlib:calibration", [2], tmp_path / "plans", calibration=LOOK)
    assert [row["tp_size"] for row in plans.rows] == [2] and sorted(plans.artifact().plans) == [2]
    answer = lowbit.generate("def f(", plans.folder, model, tmp_path / "text", max_new_tokens=3, virtual_tp=2)
    assert len(answer.rows[0]["tokens"]) == 3
    assert repr(answer).startswith(f"generate: {tmp_path / 'text'}")


def test_a_table_fits_a_terminal_and_a_notebook(tmp_path):
    rows = [{"name": "<b>", "tp": 2, "perplexity": 5.25, "kl": None, "sqnr_db": 20.0, "bits_per_value": 4.2}]
    result = StageResult("evaluate", tmp_path, rows, {"seconds": 1.25})
    lines = repr(result).splitlines()
    assert lines[0] == f"evaluate: {tmp_path}, 1.2 s" and all(len(line) <= 80 for line in lines[1:])
    assert lines[-1].split() == ["<b>", "2", "5.250", "-", "20.0", "4.200"]
    assert "<td>&lt;b&gt;</td>" in result._repr_html_() and "<td>5.250</td>" in result._repr_html_()


class AModel:
    """What passes for a model of transformers."""

    config = None

    def save_pretrained(self, folder: str) -> None:
        raise AssertionError("it is refused before it is saved")


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m, o: lowbit.quantize(m, scheme="W9", output_dir=o), "weights.scheme"),
        (lambda m, o: lowbit.quantize(m, output_dir=o, weights={"schem": "W4A8"}), "weights.schem"),
        (lambda m, o: lowbit.quantize(m, output_dir=o, weights={"scheme": "W4A4"}), "weights.scheme is given twice"),
        (lambda m, o: lowbit.quantize(m, output_dir=o, weights=4), "weights=4 is no section"),
        (lambda m, o: lowbit.quantize(m / "nothing", output_dir=o), "nothing"),
        (lambda m, o: lowbit.quantize(object(), output_dir=o), "model is a object"),
        (lambda m, o: lowbit.quantize(m, output_dir=o, tokenizer=object()), "leave it out"),
        (lambda m, o: lowbit.evaluate(m, "stdlib:validation", output_dir=o, engine="deepspeed", tp=2), "torchrun"),
        (lambda m, o: lowbit.evaluate(m, output_dir=o), "evaluation.data"),
        (lambda m, o: lowbit.generate("", m, output_dir=o), "prompt"),
        (lambda m, o: lowbit.quantize(m, scheme="W4A16", output_dir=None), "output_dir=None"),
        (lambda m, o: lowbit.quantize(m, scheme="W4A16", output_dir=5), "output_dir is of type int"),
        (
            lambda m, o: lowbit.quantize(m, scheme="W4A16", output_dir="a\0b"),
            "output_dir .* is not writable .*null byte",
        ),
        (lambda m, o: lowbit.quantize(m, data=["text"], output_dir=o), "data is of type list"),
        (lambda m, o: lowbit.evaluate(m, Path("nowhere.txt"), output_dir=o), "file 'nowhere.txt' does not exist"),
        (lambda m, o: lowbit.evaluate(m, "stdlib:validation", lowbit.Artifact(), o), "artifact is of type Artifact"),
        (lambda m, o: lowbit.quantize(AModel(), output_dir=o, tokenizer="gpt2"), "tokenizer is a str"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(call, said, model, tmp_path):
    with pytest.raises(lowbit.LowBitError, match=said) as raised:
        call(model, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out" / "lowbit.json").exists()


def test_the_quickstart_runs(tmp_path, monkeypatch):
    """The notebook's cells, one after the other, in an empty folder."""
    notebook = json.loads((Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 4 and all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in cells:
        exec(cell, names)
    assert names["quality"].rows[-1]["kl"] < 1
    assert embedded_folder().exists()
