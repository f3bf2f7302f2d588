"""megatron-lowbit benchmark model: speed, memory and bits of a quantized model beside the same in bf16."""

from __future__ import annotations

import json
import re
import statistics

import pytest
import torch
from commands import COMMAND, run_here, run_there
from tiny_models import VOCAB, build

from megatron_lowbit.config import load_config
from megatron_lowbit.launch.bench import model, model_process
from megatron_lowbit.launch.bench.config import BenchmarkModelConfig
from megatron_lowbit.launch.bench.model_process import Settings

HIDDEN, WIDE, BLOCKS, WORDS = 64, 96, 2, 512
FIELDS = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": WORDS,
    "max_position_embeddings": 32,
}
TINY = ["models=random", *(f"architecture.{key}={value}" for key, value in FIELDS.items()), "new_tokens=2", "repeats=2"]
LINEARS = BLOCKS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE)  # weights in the blocks
REST = 2 * WORDS * HIDDEN + (2 * BLOCKS + 1) * HIDDEN  # embeddings, output layer, norms


def test_rows(tmp_path):
    code, stdout, stderr = run_there(*COMMAND, "benchmark", "model", *TINY, "tokens=100", f"output_dir={tmp_path}")
    assert code == 0 and "Writing" not in stderr, stderr
    results = json.loads((tmp_path / "benchmark.json").read_text())
    rows = {row["what"]: row for row in results["rows"]}
    assert list(rows) == ["prefill", "decode", "peak memory", "running memory", "weights"]
    for row in rows.values():
        assert row["parameters"] == LINEARS + REST
        assert (row["tokens"], row["new_tokens"]) == (30, 2), "of the context of 32"
    for what, tokens in (("prefill", 30), ("decode", 1)):
        bf16, quantized = (rows[what]["seconds"][kind] for kind in ("bf16", "quantized"))
        assert len(bf16) == len(quantized) == 2
        assert rows[what]["bf16"] == tokens / statistics.median(bf16)
        assert rows[what]["quantized"] == tokens / statistics.median(quantized)
        assert rows[what]["ratio"] == statistics.median(a / b for a, b in zip(bf16, quantized, strict=True))
    # Rotary frequencies are a few float32 buffers; the packed linears may be padded by the order of a kernel.
    held = rows["weights"]
    assert 0 <= held["bf16"] - 2 * (LINEARS + REST) < 1024
    assert LINEARS / 2 + 2 * REST < held["quantized"] < held["bf16"]
    assert held["ratio"] == held["quantized"] / held["bf16"]
    assert results["same_bits"] == {"random": True}
    assert "The logits of random in W4A8 are bit for bit those of the reference op: yes." in stdout
    assert re.search(r"\d cores, \d{4}-\d\d-\d\d, (\w{9}|no commit), load \d", stdout)
    table = [line for line in stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and "prefill 30, tokens/s" in table[2] and "W4A8" in table[0]


def test_no_prompt_copies_the_output_projection(tmp_path):
    """A model from an artifact alone: torch copies a frozen weight to multiply it with a slice of the hidden states."""
    settings, _ = model.prepare(
        BenchmarkModelConfig(models=["random"], architecture=FIELDS, tokens=8, new_tokens=1), "random", tmp_path
    )
    quantized = model_process.load("quantized", settings)
    with torch.profiler.profile(record_shapes=True) as seen:
        next(model_process.passes(quantized, model_process.token_ids(settings, WORDS), settings.tokens))
    products = {event.name for event in seen.events() if any(WORDS in shape for shape in event.input_shapes)}
    assert "aten::mm" in products and "aten::bmm" not in products


@pytest.mark.parametrize("same", [True, False])
def test_other_bits_end_the_run_after_its_table(same, monkeypatch, capsys):
    """The processes' figures are given; memory is what a process holds beyond an empty one."""

    def process(kind, folder, settings, **environ):
        reference = environ == {"MEGATRON_LOWBIT_KERNELS": "reference"}
        held = {"empty": 100, "bf16": 500, "quantized": 250}[kind] * 2**20
        found = {"peak_bytes": held, "running_bytes": None, "weight_bytes": held}
        return {**found, "logits": "same" if same or not reference else "other"}

    class Logger:
        def log(self, **values):
            logged.append(values)

    logged: list[dict[str, object]] = []

    monkeypatch.setattr(model, "in_a_process", process)
    config = load_config(BenchmarkModelConfig, None, [*TINY, "tokens=4", "weights.scheme=W4A4"])
    if same:
        rows = {row["what"]: row for row in model.run(config, Logger())["rows"]}  # type: ignore[arg-type]
        assert rows["peak memory"]["ratio"] == 150 / 400 and rows["weights"]["ratio"] == 1 / 2
        assert rows["running memory"]["ratio"] is None and rows["running memory"]["bf16"] is None
    else:
        with pytest.raises(RuntimeError, match="the logits of random are not those of the reference op"):
            model.run(config, Logger())  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert f"bit for bit those of the reference op: {'yes' if same else 'no'}." in out
    assert "| random, 0M | peak memory, MiB     |   400.0 |   150.0 | 0.375 |".replace(" ", "") in out.replace(" ", "")
    assert "running memory, MiB" in out and logged[-1]["row"] == "random"


def test_what_rotation_takes_is_measured_in_the_same_rounds(monkeypatch):
    """Beside the same model without it: 4 and 3 seconds of prefill, 2 and 1 of a step; then twice that."""
    rotates = {}

    def times(config, models, settings):
        for kind in ("quantized", "unrotated"):
            names = [name for name, module in models[kind].named_modules() if vars(module).get("rotated")]
            rotates[kind] = [name.split(".")[4] for name in names]
        by_kind = {"bf16": (1.0, 1.0), "quantized": (4.0, 2.0), "unrotated": (3.0, 1.0)}
        return {kind: [pair, (2 * pair[0], 2 * pair[1])] for kind, pair in by_kind.items()}

    held = {"peak_bytes": None, "running_bytes": None, "weight_bytes": 1, "logits": "same"}
    monkeypatch.setattr(model, "in_a_process", lambda *_, **__: held)
    monkeypatch.setattr(model, "time_models", times)
    rotated = ["weights.scheme=W4A4", "weights.rotation=hadamard", "weights.attention=true"]
    measured, _ = model.measure_model(load_config(BenchmarkModelConfig, None, [*TINY, "tokens=4", *rotated]), "random")
    assert rotates == {"quantized": ["down_proj"] * BLOCKS, "unrotated": []}
    assert {row["what"]: row.get("rotation_share") for row in measured[:3]} == {
        **{"prefill": 1 / 4, "decode": 1 / 2, "peak memory": None}
    }


def test_passes_are_those_of_the_whole_sequence():
    """Logits of a prompt, and of one token after the other with a cache, against one forward over all of them: in
    float32, which sums in another order."""
    tiny = build("llama")
    ids = model_process.token_ids(Settings("", "", 7, 3, 1, 0), VOCAB)
    whole = tiny(ids).logits
    logits = list(model_process.passes(tiny, ids, 7, every_logit=True))
    assert [one.shape[1] for one in logits] == [7, 1, 1, 1]
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)
    last = next(model_process.passes(tiny, ids, 7))
    torch.testing.assert_close(last, whole[:, 6:7], rtol=1e-4, atol=1e-4)


def test_the_digest_is_of_every_bit():
    tiny = build("llama").bfloat16()
    ids = model_process.token_ids(Settings("", "", 5, 2, 1, 0), VOCAB)
    before = model_process.logits_digest(tiny, ids, 5)
    assert model_process.logits_digest(tiny, ids, 5) == before
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % VOCAB  # the last token's logits alone
    assert model_process.logits_digest(tiny, other, 5) != before


def test_seconds_of_the_passes():
    """By a clock that counts forwards: one of the prompt, and one for each token after it."""

    class Counting:
        calls = 0

        def __call__(self, **given):
            self.calls += 1
            self.logits, self.past_key_values = torch.zeros(1), None
            return self

    counting = Counting()
    ids = torch.zeros(1, 9, dtype=torch.int64)
    assert model_process.timed_passes(counting, ids, 5, lambda: 10.0 * counting.calls) == (10.0, 10.0)
    assert counting.calls == 5


def test_a_shared_storage_counts_once():
    tied = torch.nn.Linear(8, 8, bias=False)
    module = torch.nn.ModuleList([tied, torch.nn.Linear(8, 8, bias=False)])
    module[1].weight = tied.weight
    module.register_buffer("view", tied.weight.detach()[:2])
    assert model_process.weight_bytes(module) == 4 * 64


def test_peaks_start_anew():
    if model_process.peak_bytes() is None or not model_process.reset_peak():
        pytest.skip("this system has no peak that can be reset")
    before = model_process.peak_bytes()
    block = torch.ones(2**24)  # 64 MiB, written
    after = model_process.peak_bytes()
    del block
    assert before is not None and after is not None and after - before > 60 * 2**20
    kept = model_process.peak_bytes()  # Linux counts by core, and adds up now and then: pages may be missing
    assert kept is not None and kept > after - 2**22 and model_process.reset_peak()
    fresh = model_process.peak_bytes()
    assert fresh is not None and fresh < after - 30 * 2**20


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("models=/no/where", "/no/where"),
        ("models=[]", "models"),
        ("weights.scheme=none", "weights.scheme=none quantizes nothing"),
        ("weights.method=qllm", "weights.method=qllm learns from text"),
        ("model=embedded", "model=embedded changes nothing here, where `models` run in one process; leave it out"),
        ("repeats=1", "repeats"),
        ("token=4", "unknown config key 'token'; did you mean 'tokens'?"),
        ("architecture={model_type: llama, hidden_size: many}", "architecture: "),
        ("architecture.model_type=lama", "give the fields of the model's config.json"),
        ("new_tokens=32", "random: new_tokens=32 leave no room for a prompt among its 32"),
    ],
)
def test_bad_input(tmp_path, capsys, argument, message):
    assert run_here("benchmark", "model", *TINY, argument, f"output_dir={tmp_path}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
