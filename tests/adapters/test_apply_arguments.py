"""Slips in what users pass from Python: one line each, with the value and what belongs there."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import build, make_artifact

import megatron_lowbit as lowbit
from megatron_lowbit.adapters import patching
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import CommConfig, EvaluateConfig, LowBitError, WeightsConfig

MODEL = build("llama")
ARTIFACT = make_artifact(MODEL, "W4A16", (2,))
SLIPS = {
    "swapped": (lambda: lowbit.apply_to_huggingface("runs/a", MODEL), r"model first, .*not 'runs/a' first; swap"),
    "swapped Path": (lambda: lowbit.apply_to_huggingface(Path("a"), MODEL), r"model first, .*not 'a' first; swap"),
    "swapped Artifact": (lambda: lowbit.apply_to_huggingface(ARTIFACT, MODEL), r"not an Artifact first; swap"),
    "model twice": (lambda: lowbit.apply_to_huggingface(MODEL, MODEL), "the model first, then the artifact; swap"),
    "no model": (lambda: lowbit.apply_to_huggingface(None, ARTIFACT), "takes a Hugging Face model, not None"),
    "no artifact": (lambda: lowbit.apply_to_huggingface(MODEL, None), "a folder or an Artifact, not None"),
    "dict": (lambda: lowbit.apply_to_huggingface(MODEL, {}), "a folder or an Artifact, not a dict"),
    "mode": (lambda: lowbit.apply_to_huggingface(MODEL, ARTIFACT, 2, "twoshot"), "did you mean 'two_shot'"),
    "mode on one rank": (lambda: lowbit.apply_to_huggingface(MODEL, ARTIFACT, 1, "fp4"), "comm_mode='fp4' is not one"),
    "mode as dict": (
        lambda: lowbit.apply_to_huggingface(MODEL, ARTIFACT, 2, {"mode": "bf16"}),
        "CommConfig, not a dict",
    ),
    "preset": (lambda: CommConfig(preset="papr"), r"^preset='papr' is not one of best, paper; did you mean 'paper'\?$"),
    "config's mode": (lambda: CommConfig(mode="twoshot"), r"^mode='twoshot' .*did you mean 'two_shot'\?$"),
    "config's key": (lambda: CommConfig(bit=4), r"^unknown config key 'bit'; did you mean 'bits'\?$"),
    "scheme": (lambda: WeightsConfig(scheme="W4A6"), r"^scheme='W4A6' is not one of none, W4A16"),
    "section": (lambda: EvaluateConfig(comm={"mode": "twoshot"}), r"^comm\.mode='twoshot' is not one of"),
    "reducer's mode": (
        lambda: lowbit.VirtualReducer(None, "one-shot"),
        r"^mode='one-shot' .*did you mean 'one_shot'\?$",
    ),
    "whole plan": (
        lambda: lowbit.VirtualReducer(ARTIFACT.plans[2]),
        r"SitePlan of one site, .*give plan\.sites\[name\]",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_one_line(slip):
    action, message = SLIPS[slip]
    with pytest.raises(LowBitError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("virtual_tp", [0, -1, "2", True, 1.5, None, [2]])
def test_what_is_no_number_of_ranks(virtual_tp):
    with pytest.raises(LowBitError, match=r"^virtual_tp=.* is not a number of ranks; give 1, 2, 4, \.\.\.$"):
        lowbit.apply_to_huggingface(MODEL, ARTIFACT, virtual_tp)


def test_a_slip_leaves_a_patched_model_patched():
    model = lowbit.apply_to_huggingface(build("llama"), ARTIFACT, 2)
    for arguments in ((model, None), (model, Artifact(), "2")):
        with pytest.raises(LowBitError):
            lowbit.apply_to_huggingface(*arguments)
    assert patching.original_modules(model)


def test_configs_made_in_python_take_what_yaml_takes():
    """Sections as models and as dicts, and the values of a preset."""
    config = EvaluateConfig(comm=CommConfig(preset="paper"), weights={"scheme": "W4A8"})
    assert config.comm.allocation == "uniform" and config.weights == WeightsConfig(scheme="W4A8")
    assert lowbit.VirtualReducer(None, "bf16").mode == "bf16"
