"""A share of the fuzzer of unfinished runs in every run, all of it (5,000) with `-m slow`; and the cases it is for."""

from __future__ import annotations

import json

import pytest
from artifact_fuzz import counts, judge
from resume_fuzz import ResumeFuzz, calibrate_runs, quantize_runs
from tiny_models import save_model

from megatron_lowbit.config import LowBitError


@pytest.fixture(scope="module")
def fuzzers(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("quantize", "calibrate"):
        (root / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        model = save_model("llama", root / "model")
        yield {
            "quantize": quantize_runs(model, root / "quantize"),
            "calibrate": calibrate_runs(root / "calibrate", patch),
        }


@pytest.mark.parametrize("kind", ("quantize", "calibrate"))
def test_a_share_of_the_fuzzer(kind, fuzzers):
    outcomes = [fuzzers[kind].trial(seed) for seed in range(40)]
    assert judge(outcomes, forge=False) == []
    assert counts(outcomes)["refused"] > 10, "it hardly changes anything"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("quantize", "calibrate"))
@pytest.mark.parametrize("first", range(1000, 3500, 500))
def test_the_whole_fuzzer(kind, first, fuzzers):
    assert judge([fuzzers[kind].trial(seed) for seed in range(first, first + 500)], forge=False) == []


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]


def without_a_sum(data: bytes) -> bytes:
    state = json.loads(data)
    state["bit_sums"].popitem()
    return json.dumps(state).encode()


def without_a_width(data: bytes) -> bytes:
    state = json.loads(data)
    state["parts"][0]["in_features"].popitem()
    return json.dumps(state).encode()


# {what is changed: (fuzzer, part of the file's name, change)}
CHANGES = {
    "a bit of the full-precision stream": ("quantize", "resume/hp-1-", flipped),
    "a bit of the quantized stream": ("quantize", "resume/lowbit-1-", flipped),
    "zeros": ("quantize", "resume/hp-1-", lambda data: bytes(len(data))),
    "a bit sum": ("quantize", "state.json", without_a_sum),
    "a linear": ("quantize", "state.json", without_a_width),
    "a range": ("quantize", "calibration.safetensors", flipped),
    "a part": ("quantize", "-000.safetensors", flipped),
    "brackets": ("quantize", "state.json", lambda data: b"[" * 100_000),
    "an observer": ("calibrate", "observers-", flipped),
    "a batch": ("calibrate", "state.json", lambda data: data.replace(b'"done": 1', b'"done": 0')),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_state_is_refused(case, fuzzers):
    kind, part, change = CHANGES[case]
    fuzzer: ResumeFuzz = fuzzers[kind]
    files = dict(fuzzer.states[0])
    (name,) = [name for name in files if part in name]
    files[name] = change(files[name])
    assert files[name] != fuzzer.states[0][name]
    with pytest.raises(LowBitError, match=r"delete .*resume' to start the run over|delete its folder") as raised:
        fuzzer._continued(files)
    assert "\n" not in str(raised.value)


def test_ranges_of_another_state_are_refused(fuzzers):
    """Whole in themselves, and still not what this state was saved with."""
    fuzzer = fuzzers["quantize"]
    early, late = fuzzer.states
    files = dict(late)
    for name in ("calibration.json", "calibration.safetensors"):
        files[f"resume/ranges-2/{name}"] = early[f"resume/ranges-1/{name}"]
    with pytest.raises(LowBitError, match=r"calibration\.json' is missing or corrupt"):
        fuzzer._continued(files)
