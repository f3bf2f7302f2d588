"""Tables of the commands with the widest values they are likely to hold: 80 columns, and every cell in one piece."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from megatron_lowbit.config import EvaluateConfig, ParityConfig, QuantizeConfig, load_config
from megatron_lowbit.launch import benchmark, generate, parity
from megatron_lowbit.launch.bench import collectives, kernels, linear
from megatron_lowbit.launch.bench.config import BenchmarkCollectivesConfig, BenchmarkKernelsConfig
from megatron_lowbit.launch.dry_run import report as dry_run
from megatron_lowbit.launch.rows import explained, print_rows
from megatron_lowbit.launch.studies import comm_ablation
from megatron_lowbit.launch.tables import number

WIDE = {
    "name": "W4A8 + two_shot per-token tiered int4",
    "tp": 64,
    "perplexity": 523456789012.345,
    "perplexity_stderr": 65e9,
    "kl": 12.34567,
    "kl_stderr": 0.00012345,
    "sqnr_db": -12.3,
    "bits_per_value": 32.1234,
    "bytes_per_token": 12_345_678.0,
    "perplexity_change_percent": -12345.67,
    "worst_sqnr_db": -12.3,
    "worst_site": "model.layers.127.self_attn.o_proj",
    "unscaled_sqnr_db": -12.3,
}


@pytest.fixture(autouse=True)
def no_width(monkeypatch):
    """A pipe's width is 80 whatever the shell says of its own window."""
    monkeypatch.setenv("COLUMNS", "200")


def printed(capsys) -> str:
    out = capsys.readouterr().out
    assert out and max(map(len, out.splitlines())) <= 80, out
    assert "…" not in out, out
    return out


def words(out: str) -> set[str]:
    return set(out.split())


def test_evaluate(capsys):
    print_rows([WIDE, {**WIDE, "name": "adaptive_correction", "kl": None}], "a model of a long name " * 5)
    out = printed(capsys)
    assert {"64", "5.23e+11", "12.34567", "-12.3", "32.1234", "12,345,678", "adaptive_correction", "-"} <= words(out)
    assert {"12.4", "0.0001"} <= words(out)
    assert "on the first 4,096 tokens" in " ".join(out.split())
    assert "in one_shot every one of the other N - 1 ranks gets a copy" in " ".join(out.split())


def test_evaluate_explains_only_what_is_there(capsys):
    unknown = ("perplexity_stderr", "kl_stderr", "sqnr_db", "bits_per_value", "bytes_per_token")
    print_rows([{**WIDE, **dict.fromkeys(unknown)}])
    assert not {"SQNR:", "s.e.:"} & words(printed(capsys))


def test_comm_ablation(capsys):
    names = [*comm_ablation.VARIANTS, "full precision"]
    comm_ablation._print([{**WIDE, "name": name} for name in names], EvaluateConfig(virtual_tp=8, inject_outliers=50.0))
    out = printed(capsys)
    assert {"32.123", "5.23e+11", "-12345.67", "12.34567", "-12.3", "127.o_proj", "group-32", "two_shot"} <= words(out)


def test_parity(capsys):
    row: dict[str, Any] = {
        "name": "full precision",
        "engine": "huggingface",
        "tp": 16,
        "max_relative_difference": 1.23e-7,
        **dict.fromkeys(("argmax_equal", "prompt_tokens", "tokens_equal", "new_tokens"), 12345),
        **dict.fromkeys(("prompts_equal", "prompts"), 123),
    }
    parity.print_rows([row])
    assert {"full", "huggingface", "16", "1.2e-07", "12345/12345", "123/123"} <= words(printed(capsys))
    assert ParityConfig().engines  # the widest name of an engine is above


def test_benchmark(capsys):
    row = {"unpatched_seconds": 123.4567, "patched_seconds": 123.4567, "ratio": 12.345, "ratio_quartiles": [9.1, 12.8]}
    benchmark.print_rows([{**WIDE, **row}], "model, deepspeed, tp=2, 1024 tokens, bfloat16, links of 1gbit")
    assert {"123456.7", "12.345", "9.100", "12.800"} <= words(printed(capsys))


@pytest.mark.parametrize("tune", [False, True])
def test_collectives(capsys, tune):
    config = load_config(BenchmarkCollectivesConfig, None, [f"tune={tune}", "ranks=64", "sizes=1GiB"])
    assert len(config.algorithms) == 6 + tune
    rows = [
        {"algorithm": name, "ranks": 64, "bytes": 2**30, "seconds": 12.34567 * (1 + place)}
        for place, name in enumerate(config.algorithms)
    ]
    collectives.print_rows(config, rows)
    assert {"64", "12345.67", "1.00x", "74074.02", "0.17x", "exact_sum"} <= words(printed(capsys))


def test_kernels(capsys):
    row = {"format": "default", "op": "requantize", "ranks": 64, "median_seconds": {"kernel": 1.23456, "copy": 0.01}}
    row |= {"copy_share": 1.234, "clone_share": 1.234, "eager_speedup": 1234.5, "compile_speedup": None}
    kernels.print_rows(BenchmarkKernelsConfig(), [row])
    assert {"requantize", "64", "1234.56", "123", "1234.5x", "-", "compile"} <= words(printed(capsys))


def test_dry_run(capsys):
    row = {"name": "self_attn.q_proj", "parallel": "column", "shape": [131072, 16384], "shard_groups": 64}
    row |= {"shape_per_rank": [131072, 16384], "bytes_per_rank": 1_234_567_890}
    seconds = dict.fromkeys(dry_run.RESOURCES, 1_234_567.8)
    stage = {"flops": 1.23e21, "network": 1e15, "disk": 1e15, "seconds": seconds}
    names = ("load", "full precision", "reassembly", "correction", "ranges", "write")
    totals = {"groups": 99, "blocks_per_group": 4, "packed_bytes_per_rank": 1e12, "other_bytes": 1e12}
    totals |= {"group_weight_bytes_per_rank": 1e12, "stream_bytes_per_rank": 1e12, "calibrate": stage}
    rates = {**dict.fromkeys(dry_run.RESOURCES, 1e12), "given": tuple(dry_run.RESOURCES)}
    totals |= {"stages": dict.fromkeys(names, stage), "rates": rates, "estimated_seconds": 1e7}
    dry_run._print([row], {**totals, "estimated_seconds_per_group": 1e5}, QuantizeConfig(tp=64, dp=64))
    out = capsys.readouterr().out
    tables = [line for line in out.splitlines() if line.startswith(" ")]  # the sentences below them wrap by themselves
    assert max(map(len, tables)) <= 80 and "…" not in out, out
    assert {"self_attn.q_proj", "16384", "1,234,567,890", "1.23e+21", "931,322.57", "1.23e+06"} <= words(out)


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (2.84, "2.840"), (523456789012.3, "5.23e+11"), (math.inf, "inf")]
)
def test_number(value, shown):
    assert number(value, ".3f") == shown


class Letters:
    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens))

    def convert_ids_to_tokens(self, token):
        return chr(token)


def test_answers_stand_by_their_prompts(capsys):
    """Answers of several lines, and one that looks like another record."""
    prompts = ["first", "second\tprompt é"]
    answers = ["two\nlines", '\n{"prompt": "third", "text": ""}']
    streams = generate.Streams(Letters(), prompts, [[65], [66]])
    for turn in range(max(map(len, answers))):
        for place, answer in enumerate(answers):
            if turn < len(answer):
                streams.put(place, ord(answer[turn]))
    streams.end()
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": prompt, "text": answer} for prompt, answer in zip(prompts, answers, strict=True)
    ]


def test_one_answer_is_streamed(capsys):
    streams = generate.Streams(Letters(), ["only"], [[65]])
    for letter in "ab":
        streams.put(0, ord(letter))
    assert capsys.readouterr().out == "ab"
    streams.end()
    assert capsys.readouterr().out == "\n"


def test_benchmark_linear(capsys):
    """Its Markdown; a sentence is one line in a pipe, and wraps on a terminal (test_ending.py)."""
    row = {"outputs": 152064, "inputs": 18944, "threads": 128, "tokens": 16384, "way": "W4A8 x8 rotated", "cold": True}
    row |= {"median_seconds": 123.456, "ratio": 12.34, "packed_ratio": 12.34, "gops": 9999.0, "peak_share": 1.0}
    about = {"date": "2026-01-01", "commit": None, "load": 1.0}
    linear.print_rows([row | {"gb_per_second": 123.4}], {}, about)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("|", "#"))]
    assert max(map(len, table)) <= 80 and "### 152064x18944, 128 threads" in table
    assert [cell.strip() for cell in table[-1].split("|")[1:-1]] == [
        *("16384", "W4A8 x8 rotated", "123456", "12.34", "12.34", "9,999", "100 %", "123.4")
    ]


def test_an_artifact_alone_says_how_to_get_its_kl():
    alone = WIDE | {"kl": None, "sqnr_db": None}
    assert "KL: none without full precision to compare with; model=MODEL" in (explained([alone]) or "")
    assert "model=MODEL" not in (explained([WIDE | {"kl": 0.0}, alone]) or "")
