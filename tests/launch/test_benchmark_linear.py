"""megatron-lowbit benchmark linear: what is compared, checked and computed from the seconds."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from commands import COMMAND, run_here, run_there

from megatron_lowbit.config import load_config
from megatron_lowbit.kernels import build, panels
from megatron_lowbit.launch.bench import linear, linear_ways
from megatron_lowbit.launch.bench.config import BenchmarkLinearConfig
from megatron_lowbit.launch.bench.linear_ways import Way, compare, float_tolerance
from megatron_lowbit.launch.bench.peak import measure_peaks
from megatron_lowbit.launch.bench.report import markdown
from megatron_lowbit.launch.bench.shapes import MODELS, all_shapes, linear_shapes
from megatron_lowbit.quant.affine import QuantizedWeight

needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler is installed"
)
QUICK = ["weights=2", "repeats=3", "cell_seconds=0.1"]
NO_PEAKS: dict[str, dict[str, float]] = {"int8": {}, "bf16": {}}


@needs_compiler
def test_rows(tmp_path):
    """64 inputs divide into 8 groups, and not into groups of 128: int4pack is told with its reason."""
    use = ["shapes=96x64", "tokens=1,70", "schemes=W4A8,W3A16", *QUICK, f"output_dir={tmp_path}"]
    code, stdout, stderr = run_there(*COMMAND, "benchmark", "linear", *use)
    assert code == 0, stderr
    results = json.loads((tmp_path / "benchmark.json").read_text())
    rows = [row for row in results["rows"] if "ratio" in row]
    ways = ["bf16", "packed_bf16", "int_mm", "qlinear", "W4A8", "W4A8 x8", "W4A8 x8 rotated", "W3A16"]
    assert [(row["tokens"], row["way"]) for row in rows] == [(t, way) for t in (1, 70) for way in ways]
    assert [row["way"] for row in results["rows"] if "skipped" in row] == ["int4pack", "int4pack"]
    reads = {"bf16": 2 * 6144, "packed_bf16": 2 * 6144, "int_mm": 6144, "qlinear": 6144, "W4A8": 3072 + 8 * 96}
    for row in rows:
        by_way = {other["way"]: other for other in rows if other["tokens"] == row["tokens"]}
        mine, median = row["seconds"], statistics.median(row["seconds"])
        assert len(mine) == 3 and row["median_seconds"] == median and row["weights"] == 2
        for key, other in (("ratio", "bf16"), ("packed_ratio", "packed_bf16")):
            assert row[key] == statistics.median(a / b for a, b in zip(by_way[other]["seconds"], mine, strict=True))
        rate = 2 * row["tokens"] * 96 * 64 / median
        assert row["gops"] == pytest.approx(rate / 1e9)
        if peaks := results["peaks"][row["kind"]]:
            assert row["peak_share"] == pytest.approx(rate / max(peaks.values()))
        assert row["weight_bytes"] == reads.get(row["way"], row["weight_bytes"])
        expected = row["weight_bytes"] / median / 1e9 if row["tokens"] == 1 else None
        assert row["gb_per_second"] == (None if expected is None else pytest.approx(expected))
        checks = ["bits", "float32"] if row["way"] == "W3A16" else ["bits"]
        assert row.get("check") in (checks if row["way"] in ways[4:] else [None])
    table = [line for line in stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and len({len(line) for line in table}) == 1
    assert re.search(r"\d cores, \d{4}-\d\d-\d\d, (\w{9}|no commit), load \d", stdout)
    assert "Bit for bit the reference op's: W4A8, W4A8 x8, W4A8 x8 rotated" in stdout
    assert "int4pack does not run here: ValueError: 64 inputs are no multiple of its groups of 128 (96x64)." in stdout


def test_what_does_not_run_is_told(tmp_path, monkeypatch, capsys):
    """A peer that raises, groups that do not divide the inputs, and a compiler that is not there; the rest goes on."""

    def no_such_call(weight, x):
        raise AttributeError("no such call\nin this torch")

    panels.linear_kernels.find()  # loaded before there is no compiler, so that later tests have them

    def no_compiler():
        raise RuntimeError("no C++ compiler is installed (c++ or g++)")

    monkeypatch.setitem(linear_ways.PEERS, "int_mm", ("int8", 8, no_such_call))
    monkeypatch.setattr(build, "_compiler", no_compiler)
    use = ["shapes=8x12", "tokens=2", "schemes=W4A8", "act_groups=1,8", "peers=int_mm", *QUICK]
    assert run_here("benchmark", "linear", *use, f"output_dir={tmp_path}") == 0
    rows = {row["way"]: row for row in json.loads((tmp_path / "benchmark.json").read_text())["rows"]}
    assert rows.keys() == {"W4A8 x8", "int_mm", "bf16", "W4A8"}
    assert rows["int_mm"]["skipped"] == "AttributeError: no such call"
    assert rows["W4A8 x8"]["skipped"] == "8 groups do not divide 12 inputs"
    assert rows["W4A8"]["peak_share"] is None and rows["W4A8"]["packed_ratio"] is None and rows["W4A8"]["ratio"] > 0
    out = capsys.readouterr().out
    assert "Peaks of a core: no C++ compiler is installed" in out
    assert "int_mm does not run here: AttributeError: no such call (8x12)." in out


def test_a_wrong_result_ends_the_run(tmp_path, monkeypatch):
    forward = linear_ways.QuantLinear.forward

    def wrong(self, x, dtype=None):
        y = forward(self, x, dtype)
        y[-1, 0] += 1
        return y

    monkeypatch.setattr(linear_ways.QuantLinear, "forward", wrong)
    config = load_config(BenchmarkLinearConfig, None, ["tokens=200", "schemes=W4A8", "act_groups=1", "peers=[]"])
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"W4A8: 1 of \d+ results are not those of the ref"):
        linear.measure_shape(config, (8, 16), 1, NO_PEAKS)


def test_results_agree_in_bits_or_within_float32():
    torch.manual_seed(0)
    weight = QuantizedWeight.from_float(torch.randn(24, 512), 4)
    x, rows = torch.randn(5, 512).bfloat16(), torch.arange(5)
    exact = x.double() @ weight.dequantize().double().t()
    expected = exact.bfloat16()
    tolerance = float_tolerance(x, weight, expected)
    assert compare("ours", rows, expected, None, expected) == "bits"
    assert compare("ours", torch.tensor([0, 4]), expected[[0, 4]], None, expected[:3]) == "bits", "rows that are there"
    # What float32 makes of x.w - Z x.1, each summed one product after the other.
    sums = torch.zeros(2, 5, 24)
    for k in range(512):
        sums[0] += x[:, k, None].float() * weight.codes()[:, k].float()
        sums[1] += x[:, k, None].float()
    summed = ((sums[0] - sums[1] * weight.zero_point[:, 0]) * weight.scale[:, 0]).bfloat16()
    assert compare("ours", rows, expected, tolerance, summed) in ("bits", "float32")
    neighbour = torch.nextafter(expected, torch.full_like(expected, torch.inf))
    assert compare("ours", rows, expected, tolerance, neighbour) == "float32"
    # One code of one weight that is off by one: 24 channels, of which one is wrong for all tokens but those that have
    # next to nothing there.
    off = exact.clone()
    off[:, 3] += x[:, 7].double() * weight.scale[3, 0].double()
    large = x[:, 7].abs() > 0.5
    assert large.any() and ((off.bfloat16().double() - expected.double()).abs() > tolerance)[large, 3].all()
    with pytest.raises(RuntimeError, match="results are not those"):
        compare("ours", rows, expected, tolerance, off.bfloat16())
    with pytest.raises(RuntimeError, match="120 of 120 results"):
        compare("ours", rows, expected, tolerance, torch.full_like(expected, torch.nan))


def test_checked_tokens():
    """All of a small batch, and the first, the last and some between of a large one."""
    assert linear.checked_rows((1, 16)).tolist() == list(range(16))
    rows = linear.checked_rows((1, 300, 1024)).tolist()
    assert {0, 15, 299, 1023} <= {*rows} and 64 <= len(rows) < 100 and rows == sorted(rows)


def test_rounds_take_turns():
    """Two ways of three and of two calls a round, on four weights: every call is timed, one weight after the other, and
    the order of the ways alternates. The clock counts calls, so the seconds of a call are known."""
    done: list[tuple[str, int]] = []
    ways = [Way(name, "bf16", 1, lambda x: lambda: x) for name in "ab"]
    for way in ways:
        way.calls = [lambda name=way.name, place=place: done.append((name, place)) for place in range(4)]  # type: ignore
    seconds = linear.time_rounds(ways, {"a": 3, "b": 2}, 4, lambda: 2.0 * len(done))
    assert seconds == {"a": [2.0] * 4, "b": [2.0] * 4}
    assert "".join(name for name, _ in done) == "aaabb" + "bbaaa" + "aaabb" + "bbaaa"
    assert [place for name, place in done if name == "a"] == [0, 1, 2, 3] * 3
    assert [place for name, place in done if name == "b"] == [0, 1, 2, 3] * 2


def test_rounds_and_weights_of_a_cell(monkeypatch):
    """By a clock that a call moves by 4 ms: a turn is two calls, a round of two ways 16 ms. 0.1 s are six rounds, and
    slow ways get three; no way has more weights than its turns use. Of 4 weights, each of 100 bytes, and turns of two,
    two rounds pass between two uses of one: 800 bytes."""
    now, made = [0.0], []

    def make(x):
        made.append(x)

        def call():
            now[0] += 0.004
            return x

        return call

    def cell(**changes):
        made.clear()
        config = BenchmarkLinearConfig(memory_share=1).model_copy(update=changes)
        ways = [Way("bf16", "bf16", 100, make), Way("W4A8", "int8", 100, make, lambda y: "bits")]
        rows = linear.measure_cell(config, ways, torch.zeros(2, 2), lambda: now[0])
        return {row["way"]: row for row in rows}

    monkeypatch.setattr(linear, "largest_cache", lambda: 700)
    row = cell(cell_seconds=0.1, weights=4)["W4A8"]
    assert len(row["seconds"]) == 6 and row["weights"] == 4 and row["cold"] and len(made) == 8
    assert row["ratio"] == pytest.approx(1) and row["median_seconds"] == pytest.approx(0.004)
    row = cell(cell_seconds=0.001)["W4A8"]
    assert len(row["seconds"]) == 3 and row["weights"] == 6 and row["cold"]
    assert not cell(weights=2)["W4A8"]["cold"], "400 bytes pass between two uses"


def test_number_of_weights(monkeypatch):
    """Those of a round fill the cache twice: 12 at least, and no more than memory has room for."""
    monkeypatch.setattr(linear, "largest_cache", lambda: 1000)
    config = BenchmarkLinearConfig()

    def number(size: int, memory: int, config: BenchmarkLinearConfig = config) -> int:
        monkeypatch.setattr(linear, "free_memory", lambda: memory)
        return linear.number_of_weights(config, [Way("a", "bf16", size, lambda x: lambda: x)])

    assert number(10, 10**9) == 201 and number(500, 10**9) == 12 and number(1, 10**9) == linear.MOST
    assert number(500, 7000) == 7 and number(500, 10) == 1, "half of the memory"
    assert number(500, 10**9, config.model_copy(update={"weights": 3})) == 3


def test_shapes_are_those_of_the_models():
    """Against the models' published numbers of parameters: those less embeddings, output layer and norms."""
    published = {  # parameters, blocks, vocabulary, embeddings and output layers, norms
        "llama2_7b": (6_738_415_616, 32, 32000, 2, 2 * 32 + 1),
        "llama2_13b": (13_015_864_320, 40, 32000, 2, 2 * 40 + 1),
        "llama2_70b": (68_976_648_192, 80, 32000, 2, 2 * 80 + 1),
        "gemma2_27b": (27_227_128_320, 46, 256000, 1, 4 * 46 + 1),
    }
    assert published.keys() == MODELS.keys()
    for model, (parameters, blocks, vocabulary, tables, norms) in published.items():
        rest = MODELS[model].hidden * (tables * vocabulary + norms)
        whole = linear_shapes(model)
        assert blocks * sum(outputs * inputs for outputs, inputs in whole.values()) == parameters - rest
        for tp in (2, 4, 8):
            for name, (outputs, inputs) in linear_shapes(model, tp).items():
                row = name in ("o", "down")
                assert (outputs * (1 if row else tp), inputs * (tp if row else 1)) == whole[name]


def test_every_shape_is_measured_once():
    found = all_shapes(["4096x4096", "8x8"], ["llama2_7b"], ["q", "v", "up", "gate", "down"], [1, 2])
    assert found == {
        (4096, 4096): ["llama2_7b q tp=1", "llama2_7b v tp=1"],
        (8, 8): [],
        (11008, 4096): ["llama2_7b gate tp=1", "llama2_7b up tp=1"],
        (4096, 11008): ["llama2_7b down tp=1"],
        (2048, 4096): ["llama2_7b q tp=2", "llama2_7b v tp=2"],
        (5504, 4096): ["llama2_7b gate tp=2", "llama2_7b up tp=2"],
        (4096, 5504): ["llama2_7b down tp=2"],
    }


@needs_compiler
def test_peaks_of_the_instructions_that_this_processor_has():
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "avx2" not in flags.read_text():
        pytest.skip("no Linux on a processor with AVX2")
    known = set(re.findall(r"\w+", next(line for line in flags.read_text().splitlines() if line.startswith("flags"))))
    needs = {"AVX2 integers": "avx2", "AVX2 float32": "fma", "AVX-512 float32": "avx512f"}
    needs |= {"AVX-512 vpdpbusd": "avx512_vnni", "AVX-512 vdpbf16ps": "avx512_bf16"}
    peaks = measure_peaks()
    found = {**peaks["int8"], **peaks["bf16"]}
    assert {name for name, flag in needs.items() if flag in known} == {n for n in found if not n.startswith("AMX")}
    assert all(rate > 0 for rate in found.values())


def test_markdown():
    """Columns line up, and a | in a cell does not end it."""
    assert markdown({"way": "left", "ms": "right"}, [("a|b", "12.5"), ("c", "3")]).splitlines() == [
        "| way  |   ms |",
        "| ---- | ---: |",
        r"| a\|b | 12.5 |",
        "| c    |    3 |",
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("shapes=4096", "'4096' is no shape; write outputs x inputs, such as 11008x4096"),
        ("shapes=65536x65536", "more than the 2^31 values"),
        ("shapes=[]", "nothing to measure: give shapes such as 4096x4096"),
        ("tokens=0", "tokens"),
        ("threads=0", "threads"),
        ("schemes=W9A8", "'W9A8' is no scheme; write W4A8"),
        ("models=llama3_8b", "is not one of llama2_7b, llama2_13b, llama2_70b, gemma2_27b"),
        ("peers=cublas", "is not one of packed_bf16, int_mm, qlinear, int4pack"),
        ("tp=2", "tp=2 changes nothing here, where no model runs; leave it out"),
        ("bits=4", "unknown config key 'bits'"),
    ],
)
def test_bad_input(tmp_path, capsys, argument, message):
    assert run_here("benchmark", "linear", argument, f"output_dir={tmp_path}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_ranks_that_do_not_divide_a_width(tmp_path, capsys):
    assert run_here("benchmark", "linear", "models=llama2_7b", "tp_sizes=3", f"output_dir={tmp_path}") == 2
    assert "llama2_7b has a width of 4096, which does not divide among 3 ranks" in capsys.readouterr().err
