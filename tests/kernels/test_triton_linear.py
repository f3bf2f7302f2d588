"""quant_linear and quantize_tokens in Triton (triton_linear_cases.py): interpreted, and on a GPU where there is one."""

from __future__ import annotations

import sys

import pytest
import torch
from triton_process import needs_triton, run

from megatron_lowbit.kernels import gpu, gpu_linear, quant_linear, quantize_tokens
from megatron_lowbit.kernels.quantizer import TokenQuantizer

CASES = "triton_linear_cases.py"


@needs_triton
def test_same_bits_as_the_reference_in_the_interpreter():
    assert int(run(CASES, "cpu")) >= 60


@needs_triton
@pytest.mark.slow
def test_same_bits_in_the_whole_grid():
    assert int(run(CASES, "cpu", "all", timeout=3000)) >= 400


@needs_triton
@pytest.mark.gpu
def test_same_bits_on_a_gpu():
    assert int(run(CASES, "cuda")) >= 400


@needs_triton
@pytest.mark.slow
def test_bytes_moved_are_near_the_ideal():
    """A weight's byte is loaded once. Besides: tokens are read twice (for their range, then for their codes), their
    codes and a row of ones are written and read again by each of 4 programs of 64 outputs, and every piece's products
    are written and read in 4 bytes. At these small widths that is a tenth of the weight, and the 2-bit weight of the
    last, a quarter as large, is multiplied with four tokens."""
    for line in run(CASES, "bytes").splitlines():
        tokens, out, features, bits, act_bits, moved, ideal = map(int, line.split())
        rows, item = (tokens, 2) if act_bits == 16 else (tokens + 1, 1)
        programs, pieces = out // 64, 2
        prepare = tokens * features * 2 * 2 + rows * features * item
        partial = pieces * rows * out * 4 * 2
        small = 32 * tokens * programs * pieces + 8 * tokens * out  # scales, sums, zero points, once for each program
        assert ideal < moved <= ideal + prepare + programs * rows * features * item + partial + small, line
        if bits > 2:
            assert moved < 1.15 * ideal, line


def operands(**changed):
    args = {
        "x": torch.randn(3, 16),
        "packed_weight": torch.zeros(5, 8, dtype=torch.uint8),
        "scale": torch.ones(5, 1),
        "zero_point": torch.ones(5, 1),
        "weight_bits": 4,
        "act_bits": 8,
        "act_groups": 2,
        "dtype": torch.float32,
    }
    return args | changed


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"act_bits": 16}, None),
        ({"x": torch.randn(3, 16, dtype=torch.float64)}, None),
        ({"x": torch.randn(3, 16, dtype=torch.float64), "act_bits": 16}, "float64"),
        ({"weight_bits": 9}, "9 bits"),
        ({"act_bits": 9}, "9 bits"),
        ({"act_groups": 3}, "3 groups of 16 channels"),
        ({"low_ratio": 0.0}, "ratios 0.0 and 1.0"),
        ({"packed_weight": torch.zeros(40, dtype=torch.uint8)}, "1 dimensions"),
        ({"scale": torch.ones(5, 1, dtype=torch.float64)}, "float32"),
        ({"dtype": torch.int32}, "int32"),
        ({"x": torch.empty(1, 2**17, device="meta"), "act_groups": 1}, "blocks of 131072 channels"),
        ({"x": torch.empty(1, 2**18, device="meta"), "act_groups": 4}, None),  # no block is too wide for int32
        ({"x": torch.empty(2**21, 2**12, device="meta")}, "a product of 2097152 tokens"),
        ({"x": torch.empty(2**19, 2**13, device="meta")}, None),  # offsets beyond 2^31
    ],
)
def test_what_the_kernels_leave_to_the_reference(changed, reason):
    args = operands(**changed)
    acts = TokenQuantizer(args.pop("act_bits"), args.pop("act_groups"), args.pop("low_ratio", 1.0))
    found = gpu_linear.linear_obstacle(**args, acts=acts)
    assert found is None if reason is None else reason in found


def test_modes(monkeypatch):
    """reference is the reference; triton is Triton or an error; without triton the reference runs."""
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "reference")
    assert gpu_linear._kernels("triton_quantize", None) is None
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=r"MEGATRON_LOWBIT_KERNELS=triton: blocks of 131072 channels"):
        gpu_linear._kernels("gpu_tiles", "blocks of 131072 channels")
    monkeypatch.delenv("MEGATRON_LOWBIT_KERNELS")
    assert gpu_linear._kernels("gpu_tiles", "blocks of 131072 channels") is None
    monkeypatch.setitem(sys.modules, "triton", None)
    gpu.has_triton.cache_clear()
    try:
        assert gpu_linear._kernels("triton_quantize", None) is None
    finally:
        gpu.has_triton.cache_clear()


def test_torch_compile_keeps_the_ops():
    """It does not look into them: each is one node."""
    seen = []

    def backend(module, _):
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    args = operands()

    @torch.compile(backend=backend, fullgraph=True)
    def both(x):
        return quant_linear(*{**args, "x": x}.values()), quantize_tokens(x, 8, 2)

    y, codes = both(args["x"])
    assert torch.equal(y, quant_linear(*args.values())) and codes[0].dtype == torch.uint8
    assert [name for name in seen if "megatron_lowbit" in name] == [
        "megatron_lowbit.quant_linear.default",
        "megatron_lowbit.quantize_tokens.default",
    ]
