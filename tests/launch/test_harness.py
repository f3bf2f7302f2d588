"""Zero-shot tasks: our engines as lm-eval's model against its own Hugging Face class, rows with accuracy, bad input."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import harness_cases
import numpy as np
import pytest
from commands import CALIBRATION_TEXT, EVALUATION_TEXT, needs_deepspeed, needs_megatron, run_here, run_there
from harness_cases import requests
from ports import free_port
from rank_pool import RankPool
from serving import served_there
from task_files import PARADIGMS, lines, questions, write_tasks
from tiny_models import embedded_folder

import megatron_lowbit as lowbit
from megatron_lowbit.config import LowBitError
from megatron_lowbit.launch.harness import TASKS
from megatron_lowbit.runtime import preemption

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs megatron-lowbit[eval]")
LOCAL = ["local_piqa", "local_arc_easy", "local_arc_challenge", "local_hellaswag", "local_winogrande", "local_boolq"]
TEXT = {"samples": 2, "sequence_length": 32}
# No context, spaces at its end, one token to score (those are looked up), more than the context of 256 tokens.
PAIRS = [
    ("", "import os"),
    ("def f(self): ", "return 1"),
    ("x = [", "1"),
    ("x = [", "2"),
    ("import os, sys\n" * 200, " import json"),
    ("for name in", " names:\n    print(name)"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), 8)


@pytest.fixture(scope="module")
def theirs():
    """lm-eval's own class on the embedded model's folder."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(embedded_folder()), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def ours():
    from lm_eval.api.registry import get_model

    import megatron_lowbit.launch.harness.model  # noqa: F401 (registers it)

    make = get_model("megatron_lowbit").create_from_arg_string
    return make("model=embedded,engine=huggingface,dtype=float32", {"batch_size": "4", "device": None})


def check_same(found, expected):
    """Sums of some tens of float32 log-probabilities, each within 1e-6 of the other's."""
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


def test_log_likelihoods_are_those_of_lm_eval_s_own_class(ours, theirs):
    asked = requests("loglikelihood", *PAIRS)
    check_same(ours.loglikelihood(asked), theirs.loglikelihood(asked))
    rolling = requests("loglikelihood_rolling", ("import os\n" * 150,), ("return",))
    found, expected = ours.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling)
    assert found == pytest.approx(expected, rel=1e-5)  # more tokens than the context: several windows of the context


def test_generation_is_that_of_lm_eval_s_own_class(ours, theirs):
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", ("def read_lines(path):\n", settings), ("import os\n" * 300, settings))
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked) and all(found)


def test_the_same_accuracy_as_lm_eval_s_own_class(theirs, data, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"task_data": str(data)})
    expected = simple_evaluate(theirs, tasks=[*LOCAL, "local_blimp"], task_manager=manager, limit=6)["results"]
    rows = evaluate(data, tmp_path, [*LOCAL, "local_blimp"], samples=6).rows
    assert len(rows) == 1 and rows[0]["accuracy_kept_percent"] == 100
    for name, found in rows[0]["tasks"].items():
        for metric, value in found["metrics"].items():
            assert value == pytest.approx(expected[name][f"{metric},none"], abs=1e-9), (name, metric)
        assert found["measure"] == ("acc_norm" if "acc_norm,none" in expected[name] else "acc")
        assert found["accuracy"] == found["metrics"][found["measure"]]
        assert found["n"] == (6 * len(PARADIGMS) if name == "local_blimp" else 6)
    assert len(rows[0]["tasks"]["local_blimp"]["parts"]) == len(PARADIGMS) == 67
    accuracies = [found["accuracy"] for found in rows[0]["tasks"].values()]
    assert rows[0]["accuracy"] == pytest.approx(sum(accuracies) / 7)
    errors = [found["stderr"] for found in rows[0]["tasks"].values()]
    assert rows[0]["accuracy_stderr"] == pytest.approx(sum(error**2 for error in errors) ** 0.5 / 7)
    assert len(set(accuracies)) > 2, "tasks that differ"


def evaluate(data: Path, folder: Path, tasks: list[str], samples: int | None = 4, **values):
    section = {**TEXT, "tasks": tasks, "task_samples": samples, "task_data": str(data), "batch_size": 4}
    values = {"dtype": "float32", "evaluation": section, **values}
    return lowbit.evaluate("embedded", EVALUATION_TEXT, None, folder, **values)


@pytest.mark.parametrize(
    "engine", [pytest.param("deepspeed", marks=needs_deepspeed), pytest.param("megatron", marks=needs_megatron)]
)
def test_two_ranks_have_the_scores_of_one(two_ranks, theirs, engine):
    values = {"model": "embedded", "engine": engine, "tp": 2, "dtype": "float32"}
    first, second = two_ranks.run(harness_cases.scored, PAIRS, values)
    assert first == second
    check_same(first, theirs.loglikelihood(requests("loglikelihood", *PAIRS)))


def test_copies_of_the_model_share_the_documents(two_ranks, data, tmp_path):
    """Seven documents on two ranks, which lm-eval fills up to eight and counts once."""
    alone = evaluate(data, tmp_path / "one", ["local_arc_easy"], 7).rows[0]["tasks"]
    section = {**TEXT, "tasks": ["local_arc_easy"], "task_samples": 7, "task_data": str(data), "batch_size": 4}
    values = {"dtype": "float32", "dp": 2, "evaluation": section}
    rows = two_ranks.run(harness_cases.evaluated, tmp_path / "two", values)
    for row, *_ in rows:
        (found,) = row["tasks"].values()
        assert found["n"] == alone["local_arc_easy"]["n"] == 7
        assert found["metrics"] == pytest.approx(alone["local_arc_easy"]["metrics"])


def test_copies_of_the_model_share_the_windows(two_ranks, embedded_artifact, tmp_path):
    """Batches of two, two, two and one window on two copies: each figure is that of one copy, to the bit."""
    section = {"samples": 7, "sequence_length": 32, "batch_size": 2, "kl_tokens": 150}  # which ends within the third
    values = {"dtype": "float32", "virtual_tp": 2, "evaluation": section}
    alone, passes = harness_cases.shared(0, 1, embedded_artifact, tmp_path / "one", values)
    assert passes == [7, 7]
    found = two_ranks.run(harness_cases.shared, embedded_artifact, tmp_path / "two", {**values, "dp": 2})
    assert [passes for _, passes in found] == [[4, 4], [3, 3]]
    for rows, _ in found:
        assert len(rows) == 2 and rows[1]["kl"] > 0 and rows[1]["values"] > 0 and rows[1]["tokens"] == 7 * 31
        for row, whole in zip(rows, alone, strict=True):
            assert {**row, "evaluate_seconds": 0} == {**whole, "evaluate_seconds": 0}


@needs_megatron
def test_copies_on_megatron_share_the_windows(two_ranks, embedded_artifact, tmp_path):
    """The figures are those of one copy on Hugging Face, in float32 sums of another order."""
    values = {"dtype": "float32", "evaluation": {"samples": 5, "sequence_length": 32, "batch_size": 2}}
    alone, _ = harness_cases.shared(0, 1, embedded_artifact, tmp_path / "one", values)
    more = {**values, "engine": "megatron", "dp": 2}
    for rows, passes in two_ranks.run(harness_cases.shared, embedded_artifact, tmp_path / "two", more):
        assert sum(passes) in (6, 4) and len(rows) == len(alone) == 2
        for row, whole in zip(rows, alone, strict=True):
            assert row["tokens"] == whole["tokens"]
            figures = {key: row[key] for key in ("perplexity", "perplexity_stderr", "kl", "kl_stderr")}
            assert figures == pytest.approx({key: whole[key] for key in figures}, rel=1e-4, abs=1e-6)


def test_a_stop_between_tasks_of_copies(data, tmp_path):
    """Rank 1 alone gets a signal within the first task: both end that task, keep it, and leave; then they go on."""
    tasks = ["local_arc_easy", "local_hellaswag"]
    alone = evaluate(data, tmp_path / "one", tasks).rows[0]["tasks"]
    section = {**TEXT, "tasks": json.dumps(tasks), "task_samples": 4, "task_data": data, "batch_size": 4}
    argv = ["evaluate", "model=embedded", "dtype=float32", "dp=2", f"evaluation.data={EVALUATION_TEXT}"]
    argv += [f"output_dir={tmp_path}", *(f"evaluation.{key}={value}" for key, value in section.items())]
    ranks = RankPool(2)
    try:
        stopped = ranks.run(harness_cases.command, free_port(), argv, tasks[0])
        assert [(code, begun) for code, _, begun in stopped] == [(preemption.REQUEUE, tasks[:1])] * 2
        assert "evaluate keeps finished tasks, and goes on with the next" in stopped[0][1]
        assert [file.stem for file in tmp_path.glob("tasks/*/*.json")] == tasks[:1]
        assert not (tmp_path / "evaluate.json").exists()
        finished = ranks.run(harness_cases.command, free_port(), argv)
        assert [(code, begun) for code, _, begun in finished] == [(0, tasks[1:])] * 2
    finally:
        ranks.close()
    (row,) = json.loads((tmp_path / "evaluate.json").read_text())["rows"]
    assert {name: found["metrics"] for name, found in row["tasks"].items()} == {
        name: pytest.approx(found["metrics"]) for name, found in alone.items()
    }


def test_a_low_bit_row_and_what_of_it_is_kept(data, tmp_path, monkeypatch, capfd):
    tasks = ["local_arc_easy", "local_hellaswag"]
    options = {"weights": {"scheme": "W4A4"}, "virtual_tp": 2, "comm": {"preset": "paper", "mode": "one_shot"}}
    options["calibration"] = {"data": CALIBRATION_TEXT, **TEXT}
    first = evaluate(data, tmp_path, tasks, **options)
    full, low = first.rows
    assert low["accuracy_kept_percent"] == pytest.approx(100 * low["accuracy"] / full["accuracy"])
    assert json.loads((tmp_path / "evaluate.json").read_text())["rows"][1]["tasks"] == low["tasks"]
    calls = count_calls(monkeypatch)
    again = evaluate(data, tmp_path, tasks, **options)
    assert calls == [] and [row["tasks"] for row in again.rows] == [full["tasks"], low["tasks"]]
    assert "local_hellaswag" in capfd.readouterr().err
    # Another scheme, or other text to calibrate with, makes the low-bit row alone anew; a damaged file: its task alone.
    other = evaluate(data, tmp_path, tasks, **{**options, "weights": {"scheme": "W8A8"}})
    assert {row for row, _ in calls} == {"low"} and other.rows[0]["tasks"] == full["tasks"]
    calls.clear()
    (kept,) = tmp_path.glob("tasks/full*/local_hellaswag.json")
    kept.write_text(kept.read_text().replace('"n": 4', '"n": 5'))
    assert evaluate(data, tmp_path, tasks, **options).rows[0]["tasks"] == full["tasks"]
    assert {row for row, _ in calls} == {"full"}
    calls.clear()
    less = {**options, "calibration": {**options["calibration"], "samples": 1}}
    assert evaluate(data, tmp_path, tasks, **less).rows[0]["tasks"] == full["tasks"]
    assert {row for row, _ in calls} == {"low"}
    fewer = evaluate(data, tmp_path, tasks, 3, **options).rows
    assert [found["n"] for row in fewer for found in row["tasks"].values()] == [3] * 4


def count_calls(monkeypatch) -> list[tuple[str, int]]:
    """Every call of a model from lm-eval: (full or low, windows)."""
    from megatron_lowbit.launch.harness.model import EngineLM

    calls, run = [], EngineLM._model_call

    def counted(self, inps, *args):
        patched = any("megatron_lowbit" in type(m).__module__ for m in self.engine.module.modules())
        calls.append(("low" if patched else "full", len(inps)))
        return run(self, inps, *args)

    monkeypatch.setattr(EngineLM, "_model_call", counted)
    return calls


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tasks": "[local_arc_esay]"}, "lm-eval has no task 'local_arc_esay'; did you mean local_arc_easy"),
        ({"tasks": "[local_piqa]", "task_data": "nowhere"}, "evaluation.task_data: folder 'nowhere' does not exist"),
        ({"tasks": "[local_piqa]", "task_data": None}, "local_piqa' reads files; name their folder"),
        ({"tasks": "[local_boolq]"}, "it needs boolq.jsonl, boolq.jsonl.gz or boolq.zip"),
        ({"tasks": "[local_blimp]"}, "it needs BLiMP/adjunct_island.jsonl, BLiMP/adjunct_island.jsonl.gz or BLiMP.zip"),
        ({"tasks": "[local_piqa]"}, "piqa.jsonl, line 2 lacks 'gold'; every line is a JSON object with"),
        ({"tasks": "[local_arc_easy]"}, "line 1: gold=7 is not the number of one of 4 choices"),
        ({"tasks": "[local_boolq]", "task_data": "odd"}, "boolq.jsonl, line 1: its choices are no list of texts, but "),
        ({"tasks": "[local_piqa]", "task_data": "odd"}, "piqa.jsonl, line 1: query=3 is no text"),
        ({"tasks": "[local_arc_challenge]"}, "arc_challenge.jsonl, line 1 is no JSON"),
        ({"tasks": "[local_winogrande]"}, "winogrande.jsonl is empty"),
        ({"tasks": "[local_hellaswag]"}, "cannot read the questions of hellaswag"),
        ({"tasks": "[local_piqa,local_piqa]"}, "tasks names 'local_piqa' twice"),
        ({"tasks": "[]", "task_samples": "4"}, "has no effect without tasks"),
        ({"tasks": "[arc_easy]"}, "only tasks named local_... read it"),
    ],
)
def test_bad_tasks_are_one_line(settings, says, tmp_path, capfd):
    bad = tmp_path / "data"
    bad.mkdir()
    (bad / "piqa.jsonl").write_text(lines(questions(1, 2)) + '{"query": "x", "choices": ["a", "b"]}\n')
    (bad / "arc_easy.jsonl").write_text(lines([{**questions(1)[0], "gold": 7}]))
    (bad / "arc_challenge.jsonl").write_text("Question: no JSON\n")
    (bad / "winogrande.jsonl").write_text("")
    (bad / "hellaswag.jsonl.gz").write_bytes(b"no gzip")
    (odd := tmp_path / "odd").mkdir()
    (odd / "boolq.jsonl").write_text(lines([{**questions(1)[0], "choices": "ab"}]))
    (odd / "piqa.jsonl").write_text(lines([{**questions(1)[0], "query": 3}]))
    given = {"task_data": str(bad), **settings}
    if given["task_data"] == "odd":
        given["task_data"] = str(odd)
    options = [f"evaluation.{key}={value}" for key, value in given.items() if value is not None]
    text = [f"evaluation.data={EVALUATION_TEXT}", "evaluation.samples=2", "evaluation.sequence_length=32"]
    assert run_here("evaluate", "model=embedded", *text, *options, f"output_dir={tmp_path / 'out'}") == 2
    err = capfd.readouterr().err
    assert says in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out" / "evaluate.json").exists()


def test_without_lm_eval_the_line_says_what_to_install(data, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    options = ["evaluation.tasks=[local_piqa]", f"evaluation.task_data={data}", f"output_dir={tmp_path}"]
    assert run_here("evaluate", "model=embedded", f"evaluation.data={EVALUATION_TEXT}", *options) == 2
    assert "pip install 'megatron-lowbit[eval]'" in capfd.readouterr().err


def test_what_lm_eval_cannot_score_is_one_line(ours, tmp_path):
    with pytest.raises(LowBitError, match="it takes 1 to 256, the model's context"):
        ours.loglikelihood(requests("loglikelihood", ("x", " import os\n" * 400)))
    with pytest.raises(LowBitError, match=r"top_p=0\.5 cannot be had"):
        ours.generate_until(requests("generate_until", ("x", {"top_p": 0.5, "max_gen_toks": 4})))
    bare = tmp_path / "bare"
    shutil.copytree(embedded_folder(), bare, ignore=shutil.ignore_patterns("tokenizer*", "*.py", "__pycache__"))
    from megatron_lowbit.launch.harness.model import LowBitLM

    for values, says in (
        ({"model": str(bare)}, "has no tokenizer"),
        ({"model": "embedded", "evaluation.samples": 3}, "evaluation has no effect"),
        ({"model": "embedded", "engine": "huggingface", "virtual_pt": 2}, "did you mean 'virtual_tp'"),
        ({"model": "embedded", "engine": "deepspeed", "tp": 2}, "torchrun --nproc-per-node 2"),
    ):
        with pytest.raises(LowBitError, match=says):
            LowBitLM(**values)


@pytest.mark.parametrize(
    "layout", ["engine=huggingface", pytest.param("engine=deepspeed,tp=2", marks=[pytest.mark.slow, needs_deepspeed])]
)
def test_lm_eval_s_command_runs_our_model(layout, data, tmp_path, theirs):
    """On one rank or two: results are written once, by rank 0, and are those of lm-eval's own class."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"task_data": str(data)})
    expected = simple_evaluate(theirs, tasks=["local_arc_easy"], task_manager=manager)["results"]["local_arc_easy"]
    about = json.dumps({"task_data": str(data)})
    command = [sys.executable, "-m", "megatron_lowbit.launch.lm_eval", "--model", "megatron_lowbit"]
    command += ["--model_args", f"model=embedded,dtype=float32,{layout}", "--tasks", "local_arc_easy"]
    code, out, err = run_there(*command, "--metadata", about, "--output_path", tmp_path)
    assert code == 0, err
    assert out.count("local_arc_easy") == 1
    (file,) = tmp_path.rglob("results*.json")
    found = json.loads(file.read_text())["results"]["local_arc_easy"]
    measures = ("acc,none", "acc_norm,none")
    assert [found[name] for name in measures] == pytest.approx([expected[name] for name in measures])


@pytest.mark.slow
def test_names_of_local_tasks_are_not_lm_eval_s():
    from lm_eval.tasks import TaskManager

    theirs = set(TaskManager().all_tasks)
    ours = TaskManager(include_path=str(TASKS), include_defaults=False).all_tasks
    assert sorted([*LOCAL, "local_blimp"]) == ours
    assert not theirs & {*ours, *PARADIGMS}, "a paradigm of that name would be lm-eval's task"


def test_what_ranks_hand_on():
    """lm-eval's dicts with tuples for keys, numpy's numbers; what has no plain form is text, as in its files."""
    from megatron_lowbit.io.messages import decode, encode
    from megatron_lowbit.launch.harness.plain import from_plain, to_plain

    given = {"task": {("acc", "none"): [1.0, np.float64(0.5), np.bool_(True)], ("ppl", "none"): [(-1.5, 3)], 2: None}}
    told = from_plain(decode(encode(to_plain(given))))
    assert told == given and [type(v) for v in told["task"]["acc", "none"]] == [float, float, bool]
    assert from_plain(to_plain([len])) == [str(len)]


@pytest.fixture
def local_completions(tmp_path):
    """--model_args of lm-eval's local-completions for a server of the embedded model."""
    pytest.importorskip("tenacity", reason="needs lm-eval[api]")
    with served_there("model=embedded", f"output_dir={tmp_path / 'serve'}") as (_, url):
        about = f"tokenizer={embedded_folder()},max_length=256,add_bos_token=True"
        yield f"model=embedded,base_url={url}/v1/completions,{about}"


def test_lm_eval_s_local_completions_score_through_our_server(theirs, local_completions):
    from lm_eval.api.registry import get_model

    model = get_model("local-completions").create_from_arg_string(local_completions)
    asked = requests("loglikelihood", *PAIRS[1:4], PAIRS[5])
    check_same(model.loglikelihood(asked), theirs.loglikelihood(asked))
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    texts = requests("generate_until", ("def read_lines(path):\n", settings), ("import os\n", settings))
    assert model.generate_until(texts) == theirs.generate_until(texts)


@pytest.mark.slow
def test_lm_eval_s_command_evaluates_our_server(theirs, data, local_completions, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    about = {"task_data": str(data)}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=about)
    expected = simple_evaluate(theirs, tasks=["local_arc_easy"], task_manager=manager)["results"]["local_arc_easy"]
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", local_completions]
    command += ["--tasks", "local_arc_easy", "--include_path", TASKS, "--metadata", json.dumps(about)]
    code, _, error = run_there(*command, "--output_path", tmp_path)
    assert code == 0, error
    (file,) = tmp_path.rglob("results*.json")
    found = json.loads(file.read_text())["results"]["local_arc_easy"]
    for metric in ("acc,none", "acc_norm,none"):
        assert found[metric] == pytest.approx(expected[metric])
