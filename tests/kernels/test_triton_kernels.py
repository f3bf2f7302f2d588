"""Triton's kernels against the reference (triton_cases.py): interpreted, and on a GPU where there is one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from triton_process import needs_triton, run

from megatron_lowbit.comm.codec import Codec, WireFormat


@needs_triton
def test_same_bits_as_the_reference_in_the_interpreter():
    """Every fifth case: kinds of values come in sevens, so that each kind is met, and with either form of scales."""
    assert int(run("triton_cases.py", "cpu", "5")) >= 12


@needs_triton
@pytest.mark.slow
def test_same_bits_in_the_interpreter_in_every_case():
    assert int(run("triton_cases.py", "cpu")) >= 40


@needs_triton
@pytest.mark.gpu
def test_same_bits_as_the_reference_on_a_gpu():
    assert int(run("triton_cases.py", "cuda")) >= 40


def test_scales_of_bf16_features_are_infinite():
    """Triton knows them by that."""
    bits = torch.tensor([4, 16, 4, 16], dtype=torch.uint8)
    format = WireFormat(Codec(torch.ones(2, 4), torch.ones(2, 4), bits, per_token=True))
    assert format.scale.tolist() == 2 * [[1.0, float("inf"), 1.0, float("inf")]]
    assert format.zero_point.tolist() == 2 * [[1.0, 0.0, 1.0, 0.0]]


def test_importing_the_package_does_not_import_triton():
    code = "import sys, megatron_lowbit.kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
