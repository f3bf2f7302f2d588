"""The gather of reassembly, after a norm or without, in Triton: interpreted, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from triton_process import needs_triton, run

from megatron_lowbit.kernels import gpu_linear


@needs_triton
def test_same_bits_as_the_reference_in_the_interpreter():
    assert int(run("triton_reassembly_cases.py", "cpu")) >= 36


@needs_triton
@pytest.mark.gpu
def test_same_bits_as_the_reference_on_a_gpu():
    assert int(run("triton_reassembly_cases.py", "cuda")) >= 36


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({}, None),
        ({"x": torch.empty(2, 8, dtype=torch.float64)}, "tokens are torch.float64 [2, 8]"),
        ({"x": torch.empty(2, 0)}, "tokens are torch.float32 [2, 0]"),
        ({"src_idx": torch.arange(9, dtype=torch.int32)}, "entries are torch.int32, torch.int64 and torch.float32"),
        ({"width": 10}, "9, 9 and 9 entries make 10 channels"),
        ({"coefficient": torch.ones(8)}, "9, 9 and 8 entries make 8 channels"),
    ],
)
def test_what_the_kernel_leaves_to_the_reference(changes, obstacle):
    index = torch.arange(9)
    arguments = {"x": torch.empty(2, 8), "src_idx": index, "dst_idx": index, "coefficient": torch.ones(9), "width": 8}
    assert gpu_linear.reassembly_obstacle(**{**arguments, **changes}, eps=1e-5) == obstacle
