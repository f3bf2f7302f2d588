"""The rotation of channels: the definition against its matrix in float64, and every backend against the definition."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import DTYPES

from megatron_lowbit import kernels
from megatron_lowbit.kernels.hadamard import split_width

# Slices of a power of two, of an odd number, and of both: LLaMA-2 7B (1376 in 8 shard groups), SmolLM2, Qwen2.5 (37).
WIDTHS = [1, 2, 3, 16, 37, 43, 64, 72, 88, 96, 128, 172, 576, 1376, 37 * 64]


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to a dtype."""
    return torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("width", WIDTHS)
def test_the_matrix_is_symmetric_orthogonal_and_even(width):
    """Exactly symmetric; orthogonal up to the roundings of `width` products; no entry above sqrt(2 / width)."""
    matrix = kernels.hadamard_matrix(width)
    assert matrix.shape == (width, width) and matrix.dtype == torch.float64
    assert torch.equal(matrix, matrix.T)
    error = (matrix @ matrix - torch.eye(width, dtype=torch.float64)).abs().max()
    assert error <= 4 * width * torch.finfo(torch.float64).eps
    assert matrix.abs().max() <= (2 / width) ** 0.5 * (1 + 1e-12)
    assert torch.equal(kernels.hadamard_matrix(width, torch.float32), matrix.float())


def test_powers_of_two_are_sylvesters():
    expected = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert torch.equal(kernels.hadamard_matrix(4), expected.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_against_the_matrix_in_float64(width, dtype):
    """An output takes m products and sums, k sums and two more roundings (of 2^(-k/2) and by it), and one of the
    matrix; each is relative to a sum of magnitudes that |R| |x| bounds by sqrt(2)^2 |x|_1 / sqrt(n). Then one rounding
    to the dtype. float64: the oracle has as many roundings of its own."""
    x = torch.randn(3, 2 * width, generator=torch.Generator().manual_seed(width)).to(dtype)
    matrix = kernels.hadamard_matrix(width)
    exact = (x.double().unflatten(1, (2, width)) @ matrix).flatten(1)
    k, m = split_width(width)
    steps = m + k + 4 if dtype != torch.float64 else m + k + 4 + width
    magnitude = x.double().abs().unflatten(1, (2, width)).sum(-1, keepdim=True) * (2 / width**0.5)
    error = (kernels.hadamard(x, 2).double() - exact).abs().unflatten(1, (2, width))
    final = torch.promote_types(dtype, torch.float32) != dtype
    allowed = steps * rounding(torch.promote_types(dtype, torch.float32)) * magnitude
    allowed = allowed + final * rounding(dtype) * (exact.abs().unflatten(1, (2, width)) + allowed) + final * 2.0**-24
    assert (error <= allowed).all()


def test_it_is_its_own_inverse():
    x = torch.randn(5, 4, 344, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kernels.hadamard(kernels.hadamard(x, 2), 2), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(24,), (2, 24), (2, 3, 24), (0, 24)])
def test_gradients(shape):
    """The op is linear and its own transpose; the gradient's gradient too."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = kernels.hadamard(x, 2)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(grad, kernels.hadamard(torch.ones_like(y), 2))
    if x.numel():
        assert torch.autograd.gradcheck(kernels.hadamard, (x, 2))
        assert torch.autograd.gradgradcheck(kernels.hadamard, (x, 2))


@pytest.mark.parametrize(
    ("width", "groups", "message"),
    [
        (2 * 1031, 1, r"2062 channels would take 1031 products .* 1031 groups of 2 channels would fit"),
        (3 * 5 * 79 * 4, 1, r"4740 channels would take 1185 products .* 3 groups of 1580 channels would fit"),
        (24, 5, "5 groups do not divide 24 channels"),
        (24, 0, "0 groups do not divide"),
        (0, 1, "1 groups do not divide 0 channels"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_widths_that_do_not_fit(width, groups, message, backend, monkeypatch):
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", backend)
    with pytest.raises(ValueError, match=message):
        kernels.hadamard(torch.ones(2, width), groups)
    if groups == 1:
        with pytest.raises(ValueError, match=message):
            kernels.hadamard_matrix(width)


def test_the_suggested_groups_fit():
    assert kernels.hadamard_obstacle(2062, 1031) is kernels.hadamard_obstacle(4740, 3) is None
    assert kernels.hadamard_obstacle(11008, 8) is kernels.hadamard_obstacle(1023) is None


@pytest.mark.parametrize("x", [torch.ones(2, 8, dtype=torch.int64), torch.tensor(1.0)])
def test_what_is_not_a_row_of_floats(x):
    with pytest.raises(ValueError, match=r"not float \[..., width\]"):
        kernels.hadamard(x, 1)


def test_torch_compile_keeps_the_op():
    """One node, with a gradient, and shapes by its fake."""
    seen = []

    def backend(module, _):
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda x: kernels.hadamard(x, 2), backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), kernels.hadamard(x, 2))
    assert seen == ["megatron_lowbit.hadamard.default"]
    torch.library.opcheck(kernels.hadamard, (x.requires_grad_(), 2))
    torch.library.opcheck(kernels.hadamard, (torch.randn(24, 3).T, 8))
