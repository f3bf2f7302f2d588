"""report.html: what it shows is what the folder holds, and nothing else; bad input; large models; no matplotlib."""

from __future__ import annotations

import base64
import csv
import json
import re
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import EVALUATION, run_here
from example_runs import TRAP, calibrated, evaluated, quantized, site_names, whole_run, write_record

from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.files import read_json
from megatron_lowbit.launch import runner
from megatron_lowbit.launch.page import communication, figure
from megatron_lowbit.launch.page.build import LARGEST, write_page
from megatron_lowbit.launch.page.runs import read_run


class Page(HTMLParser):
    """Headings, tables and links of a page. tables: {aria-label: rows of cells}; csv: {file name: rows}."""

    def __init__(self, file: Path):
        super().__init__()
        self.headings: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.csv: dict[str, list[list[str]]] = {}
        self.tags: list[str] = []
        self._table: list[list[str]] = []
        self._text: list[str] | None = None
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        about = dict(attrs)
        self.tags.append(tag)
        if (about.get("aria-label") or "").startswith("Table: "):
            self._table = self.tables[about["aria-label"].removeprefix("Table: ")] = []
        if tag == "tr":
            self._table.append([])
        if tag in ("h1", "h2", "h3", "td", "th"):
            self._text = []
        if tag == "a" and "download" in about:
            kind, _, data = about["href"].partition(",")
            assert kind == "data:text/csv;charset=utf-8;base64"
            self.csv[about["download"]] = list(csv.reader(base64.b64decode(data).decode().splitlines()))

    def handle_data(self, data):
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag):
        if self._text is not None and tag in ("h1", "h2", "h3"):
            self.headings.append("".join(self._text))
        elif self._text is not None and tag in ("td", "th"):
            self._table[-1].append("".join(self._text))
        self._text = None if tag in ("h1", "h2", "h3", "td", "th") else self._text


def page_of(*folders: Path) -> Page:
    output = folders[0] / "page.html"
    write_page(list(folders), output)
    return Page(output)


def test_a_whole_run_has_all_sections(tmp_path):
    page = page_of(whole_run(tmp_path / "run"))
    assert page.headings[0] == "run: quantize, evaluate, benchmark"
    sections = ["Quality", "Communication", "Quantization", "Time and size", "Benchmarks", "How it was run"]
    assert [heading for heading in page.headings if heading in sections] == sections
    assert "script" not in page.tags and page.tags.count("html") == 1


def test_a_section_without_data_is_not_there(tmp_path):
    evaluated(tmp_path)
    headings = page_of(tmp_path).headings
    assert "Quality" in headings and "Saturation and fall-backs" in headings
    assert not {"Quantization", "Benchmarks", "Feature ranges by site and rank, tp_size 4"} & set(headings)


def test_tables_hold_what_the_results_say(tmp_path):
    page = page_of(whole_run(tmp_path / "run"))
    first, *rows = page.tables["Perplexity"]
    assert first[:4] == ["run", "name", "perplexity", "perplexity_stderr"]
    assert [row[:4] for row in rows[:2]] == [["run", "full precision", "10", "0.5"], ["run", f"{TRAP} 0", "11", "0.5"]]
    assert page.tables["Accuracy"][1] == ["run", f"{TRAP} 0", "0.5", "0.02", "98.5"]
    assert page.tables["Accuracy by task"][1] == ["run", f"{TRAP} 0", "piqa", "0.5", "0.02", "600"]
    _, *searched = page.tables["Threshold search"]
    assert [row[1:] for row in searched[:3]] == [["0", "1"], ["2", "0.7"], ["4", "0.5"]]
    _, *outliers = page.tables["Outlier channels before and after reassembly"]
    assert {tuple(row[1:3]) for row in outliers} == {("9", "3")}
    fallen = {row[1]: row[-1] for row in page.tables["Saturation and fall-backs"][1:]}
    assert fallen[f"{TRAP} 0"] == "none" and fallen[f"{TRAP} 1"] == site_names(2)[0]
    losses = page.tables["Loss of the low-rank correction"][1:]
    assert [row[2:] for row in losses] == [["0", "–", "0.6"], ["1", "0.4", "0.5"], ["2", "0.3", "0.35"]]


def test_ranges_and_bf16_features_are_the_plans(tmp_path):
    calibrated(tmp_path)
    page = page_of(tmp_path)
    run = read_run(tmp_path)
    rows = page.csv["feature-ranges-by-site-and-rank-tp_size-4.csv"]
    assert len(rows) == 1 + 4 * 4 and len(rows[0]) == 1 + 64  # sites x ranks, features
    site = run.stats.ranges[4]["model.layers.1.mlp.down_proj"]
    (found,) = (row for row in rows if row[0] == "1.mlp.down_proj rank 3")
    widths = (site.max_vals - site.min_vals)[3].tolist()
    assert [float(cell) for cell in found[1:]] == pytest.approx(widths, rel=1e-3)
    assert {row[1] for row in page.tables["The bf16 features"][1:]} == {"5"}
    bits = page.tables["Bits per feature, tp_size 4"]
    assert bits[0][2:] == ["features", "mean bits", "bf16 features", "in 4 bits", "in bf16"]
    assert {tuple(row[2:]) for row in bits[1:]} == {("64", "4.188", "1", "63", "1")}


def test_the_csv_is_the_whole_table(tmp_path, monkeypatch):
    monkeypatch.setattr(figure, "SHOWN", 2)
    (tmp_path / "run").mkdir()
    evaluated(tmp_path / "run")
    page = page_of(tmp_path / "run")
    assert len(page.tables["SQNR by site"]) == 1 + 2 and len(page.csv["sqnr-by-site.csv"]) == 1 + 3 * 4
    assert page.csv["sqnr-by-site.csv"][1] == ["run", f"{TRAP} 0", site_names(1)[0], "20.0"]


def test_sizes_are_told_apart(tmp_path):
    """Rows of one name at several numbers of ranks, as `--experiment lowbit_comm` has them."""
    (tmp_path / "run").mkdir()
    evaluated(tmp_path / "run")
    file = tmp_path / "run" / "evaluate.json"
    record = json.loads(file.read_text())
    low = record["rows"][-1]
    record["rows"] += [{**low, "tp": 4}, {**low, "tp": 8}]
    file.write_text(json.dumps(record))
    names = [row[1] for row in page_of(tmp_path / "run").tables["Perplexity"][1:]]
    assert len(set(names)) == len(names) == len(record["rows"]) and names[-1].endswith(", TP 8")


def test_several_runs_are_told_apart(tmp_path):
    for name in ("a/run", "b/run", "c/other"):
        (tmp_path / name).mkdir(parents=True)
        evaluated(tmp_path / name)
    page = page_of(tmp_path / "a/run", tmp_path / "b/run", tmp_path / "c/other")
    runs = {row[0] for row in page.tables["Perplexity"][1:]}
    assert runs == {str(tmp_path / "a/run"), str(tmp_path / "b/run"), "other"}


def test_a_large_model_makes_a_small_page(tmp_path):
    """80 layers, 8 ranks and 1,024 features: neighbouring features share a cell, which shows the widest."""
    calibrated(tmp_path, layers=80, features=1024, sizes=(8,))
    quantized(tmp_path, layers=80)
    evaluated(tmp_path, layers=80, rows=20)
    size = write_page([tmp_path], tmp_path / "page.html")
    assert size < LARGEST
    page = Page(tmp_path / "page.html")
    rows = page.csv["feature-ranges-by-site-and-rank-tp_size-8.csv"]
    assert len(rows) == 1 + 80 * 2 * 8
    assert (len(rows) - 1) * (len(rows[0]) - 1) <= communication.CELLS
    assert {row[1] for row in rows[1:]} == {"200.0"}  # the cell of feature 5
    assert "neighbouring features" in (tmp_path / "page.html").read_text()


def test_a_page_that_is_too_large_is_not_written(tmp_path, monkeypatch):
    evaluated(tmp_path)
    monkeypatch.setattr("megatron_lowbit.launch.page.build.LARGEST", 1000)
    with pytest.raises(LowBitError, match="name fewer runs"):
        write_page([tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_pictures_have_no_fixed_colours_and_no_shared_ids(tmp_path):
    pytest.importorskip("matplotlib")
    text = whole_page(tmp_path)
    pictures = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(pictures) > 10
    for picture in pictures:
        fixed = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", picture))
        assert not fixed, "a fixed colour is seen on one of the two backgrounds alone"
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def whole_page(folder: Path) -> str:
    write_page([whole_run(folder / "run")], folder / "page.html")
    return (folder / "page.html").read_text()


def test_without_matplotlib_there_are_tables_and_a_hint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = whole_page(tmp_path)
    assert "<svg" not in text and "pip install &#39;megatron-lowbit[report]&#39;" in text
    assert Page(tmp_path / "page.html").tables["Perplexity"]


def test_odd_results_do_not_stop_the_page(tmp_path):
    """A perplexity of NaN, rows of other shapes, values of other types: what is no figure is left out."""
    rows = [
        {"name": "nan", "perplexity": float("nan"), "kl": float("inf"), "sites": {"a": float("nan"), "b": 3.0}},
        {"name": None, "perplexity": "12", "groups": [1, {"layers": {"x": 1}, "losses": ["a"]}], "values": True},
        {"groups": {"a": 1}, "weight_bits": 3, "bf16_sites": 7, "values": 3, "sites": [1]},
        {"algorithm": "bf16", "ranks": None}, {"way": 1, "tokens": 0, "outputs": 0}, {},
    ]  # fmt: skip
    write_record(tmp_path, "benchmark", rows, 1.0)
    page = page_of(tmp_path)
    assert "Perplexity" not in page.tables and page.tables["SQNR by site"][1] == [tmp_path.name, "nan", "b", "3"]


def test_the_command(tmp_path, monkeypatch, capsys):
    evaluated(tmp_path)
    assert run_here("report", tmp_path) == 0
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'report.html'}, ")
    assert (tmp_path / "report.html").exists()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    evaluated(tmp_path / "other")
    assert run_here("report", tmp_path, tmp_path / "other") == 0 and (tmp_path / "comparison.html").exists()
    assert run_here("report", tmp_path, "--output", tmp_path / "mine.html") == 0 and (tmp_path / "mine.html").exists()


def damaged(folder: Path) -> list[object]:
    (folder / "evaluate.json").write_text('{"rows": [')
    return [folder]


def without_rows(folder: Path) -> list[object]:
    (folder / "evaluate.json").write_text('{"rows": [1]}')
    return [folder]


def damaged_plan(folder: Path) -> list[object]:
    calibrated(folder)
    (folder / "comm_plan_tp2.safetensors").write_bytes(b"no")
    return [folder]


def not_to_be_written(folder: Path) -> list[object]:
    evaluated(folder)
    return [folder, "--output", folder / "none" / "page.html"]


BAD = {
    "holds no results": lambda folder: [folder],
    "is no folder": lambda folder: [folder / "none"],
    "evaluate.json": damaged,
    "it has no rows": without_rows,
    "comm_plan_tp2": damaged_plan,
    "cannot write": not_to_be_written,
    "RUN": lambda folder: [],
    "--colour": lambda folder: [folder, "--colour"],
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_one_line(said, tmp_path, capsys):
    assert run_here("report", *BAD[said](tmp_path)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err
    assert not list(tmp_path.glob("**/*.html")) and not list(tmp_path.glob("**/.*"))


def test_a_stage_writes_the_page(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    argv = ["evaluate", "model=embedded", "virtual_tp=2", *EVALUATION, f"output_dir={tmp_path}"]
    assert run_here(*argv, pictures=True) == 0
    page = Page(tmp_path / "report.html")
    assert "svg" in page.tags
    row = read_json(tmp_path / "evaluate.json")["rows"][0]
    assert float(page.tables["Perplexity"][1][2]) == pytest.approx(row["perplexity"], rel=1e-3)
    assert f"wrote evaluate.json and report.html to {tmp_path} in " in capsys.readouterr().err


def test_a_page_that_cannot_be_made_fails_no_stage(tmp_path, monkeypatch, capsys):
    """Another stage's damaged result is one line; a mistake of ours is a warning, which these tests take for an
    error."""
    (tmp_path / "evaluate.json").write_text("{")
    (tmp_path / "report.html").write_text("of an earlier run")
    assert runner.make_page(tmp_path) is None and not (tmp_path / "report.html").exists()
    assert "no report.html" in capsys.readouterr().err

    def mistaken(*_):
        raise KeyError("ours")

    monkeypatch.setattr("megatron_lowbit.launch.page.build.write_page", mistaken)
    with pytest.raises(UserWarning, match=r"no report\.html: KeyError"):
        runner.make_page(tmp_path)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert runner.make_page(tmp_path) is None


def test_help_names_its_arguments(capsys):
    with pytest.raises(SystemExit):
        run_here("report", "--help")
    out = capsys.readouterr().out
    assert "RUN" in out and "--output" in out and max(map(len, out.splitlines())) <= 80
