"""Triton's kernels of quant_linear and quantize_tokens against the reference: `python triton_linear_cases.py cpu|cuda`.

On the CPU it needs TRITON_INTERPRET=1. Prints the number of cases; the first that differs ends it with an error. `all`
behind it: the whole grid, which takes the interpreter minutes.
"""

from __future__ import annotations

import sys
from itertools import product

import torch
from torch import Tensor

from megatron_lowbit.kernels import dequantize, gpu_linear, pack_bits, quant_linear, triton_linear, triton_quantize
from megatron_lowbit.kernels.linear import quant_linear_reference
from megatron_lowbit.kernels.packing import unpack_bits
from megatron_lowbit.kernels.quantizer import TokenQuantizer, quantize_tokens_reference
from megatron_lowbit.quant.affine import choose_qparams, quantize

SMALL = triton_linear.Tile(16, 16, 32, 4, 1)  # several tiles even in small tensors
# (tokens, out, in, activation groups, weight group size)
SHAPES = [
    (1, 1, 2, 1, None),
    (4, 18, 172, 4, None),  # two tiles of outputs; blocks of 43 channels, which begin inside a word
    (2, 5, 60, 2, 20),  # groups of which neither holds the other
    (17, 3, 40, 1, None),  # two tiles of tokens
    (2, 3, 300, 1, None),  # several tiles of words, the last not full
    (2, 3, 20, 2, None),
]
BITS = [(4, 4), (8, 4), (6, 6), (8, 8), (2, 2), (5, 3), (7, 7), (3, 5)]  # activations, weight
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
AWKWARD = {
    "plain": lambda x: x,
    "far from zero": lambda x: x * 1e-3 + 1e6,
    "constant": lambda x: torch.full_like(x, 2.7),
    "large constant": lambda x: torch.full_like(x, 16.0),  # its clipped range leaves codes above 0
    "zero": torch.zeros_like,
    "positive": torch.abs,
    "denormal": lambda x: x * 1e-40,
    "outliers": lambda x: x * torch.where(torch.arange(x.shape[1]) % 31 == 3, 1e4, 1.0),
    "NaN": lambda x: x.index_put((torch.tensor([0]), torch.tensor([1])), torch.tensor(float("nan"))),
    "infinite": lambda x: x.index_put((torch.tensor([0]), torch.tensor([1])), torch.tensor(float("-inf"))),
    "the whole range": lambda x: x * 1e38,
}


def interpret_bf16_products() -> None:
    """Let the interpreter multiply bf16 as values. It keeps their bits as uint16, and multiplies those."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def values(handle: TensorHandle) -> np.ndarray:
        if handle.dtype.scalar.name != "bf16":
            return handle.data
        return (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def create_dot(self, a, b, d, *_):
        return TensorHandle(np.matmul(values(a), values(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def operands(shape: tuple, weight_bits: int, kind: str = "plain", of_weight: bool = False) -> tuple:
    """(x, packed, scale, zero_point): x with a mean, so that zero points matter."""
    tokens, out, features, _, group_size = shape
    generator = torch.Generator().manual_seed(features + out)
    x = torch.randn(tokens, features, generator=generator) + 1
    weight = torch.randn(out, features, generator=generator)
    scale, zero = choose_qparams(weight, weight_bits, group_size=group_size)
    packed = pack_bits(quantize(weight, scale, zero, weight_bits), weight_bits)
    if of_weight:
        wild = AWKWARD[kind](dequantize(unpack_bits(packed, weight_bits, features), scale, zero))
        return x, packed, *choose_qparams(wild, weight_bits, group_size=group_size, real_zero=True)
    return AWKWARD[kind](x), packed, scale, zero


def assert_same_bits(ours: Tensor, wanted: Tensor, case: tuple) -> None:
    assert ours.dtype == wanted.dtype and ours.shape == wanted.shape, case
    view = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[ours.element_size()]
    broken = ours.isnan() & wanted.isnan() if ours.is_floating_point() else torch.zeros_like(ours, dtype=torch.bool)
    same = (ours.view(view) == wanted.view(view)) | broken
    assert same.all(), (case, ours[~same], wanted[~same])


def check_tokens(
    tokens: int, features: int, bits: int, groups: int, kind: str, dtype: torch.dtype, *ratios: float, device: str
) -> None:
    case = (tokens, features, bits, groups, kind, dtype, *ratios)
    x = operands((tokens, 1, features, 1, None), 4, kind)[0].to(dtype)
    acts = TokenQuantizer(bits, groups, *ratios)
    wanted = quantize_tokens_reference(x, *acts)
    x = x.to(device).t().contiguous().t() if tokens > 2 else x.to(device)  # rows whose values lie apart
    ours = [t.cpu() for t in triton_quantize.quantize_tokens(gpu_linear._rows(x), acts)]
    assert_same_bits(ours[0], wanted[0], case)
    assert_same_bits(ours[1], wanted[1], case)
    # A zero's sign is that of whichever zero is found first in the row, and no product depends on it.
    assert torch.equal(ours[2].nan_to_num(), wanted[2].nan_to_num()), case
    assert torch.equal(ours[2].isnan(), wanted[2].isnan()), case


def check_codes(
    shape: tuple, bits: tuple[int, int], dtype, kind: str, of_weight: bool, *ratios: float, device: str
) -> None:
    """Integer products: the reference's bits, however the work is divided."""
    act_bits, weight_bits = bits
    args = operands(shape, weight_bits, kind, of_weight)
    wanted = quant_linear_reference(*args, weight_bits, act_bits, shape[3], dtype, *ratios)
    how = weight_bits, TokenQuantizer(act_bits, shape[3], *ratios), dtype
    for split in (True, False):
        ours = triton_linear.quant_linear(*(t.to(device) for t in args), *how, SMALL, split)
        assert_same_bits(ours.cpu(), wanted, (shape, bits, dtype, kind, of_weight, split, *ratios))


def check_values(shape: tuple, weight_bits: int, dtype: torch.dtype, device: str) -> None:
    """Products of floats: near the reference, and of one token the same bits in every batch and for every division of
    the work."""
    x, packed, scale, zero = operands(shape, weight_bits)
    x = x.to(dtype)
    how, case = (weight_bits, TokenQuantizer(16), torch.float32), (shape, weight_bits, dtype)
    on_device = [t.to(device) for t in (x, packed, scale, zero)]
    tile = SMALL._replace(words=triton_linear.plane_words(triton_linear.problem(x, scale, weight_bits, 16, 1)))
    ours = [triton_linear.quant_linear(*on_device, *how, tile, split).cpu() for split in (True, False)]
    assert_same_bits(*ours, case)
    single = triton_linear.quant_linear(on_device[0][-1:], *on_device[1:], *how, tile).cpu()
    assert_same_bits(single[0], ours[0][-1], case)
    # A sum of n float32 products, in any order and even without rounding up, errs by n 2^-23 of the sum of their
    # sizes; the float64 steps behind it are exact beside that, and the last rounding errs by 2^-24 on each side.
    n = min(x.shape[1] // scale.shape[1], triton_linear.PIECE + 128) + 1
    codes = unpack_bits(packed, weight_bits, x.shape[1]).double()
    sizes = (codes.unflatten(1, (scale.shape[1], -1)) * scale[..., None].double()).flatten(1)
    wanted = quant_linear_reference(x, packed, scale, zero, weight_bits, 16, 1, torch.float32).double()
    room = n * 2**-23 * (x.double().abs() @ sizes.t()) + 2**-23 * wanted.abs()
    assert ((ours[0].double() - wanted).abs() <= room).all(), (case, ((ours[0].double() - wanted).abs() / room).max())


def check_dispatched(device: str) -> int:
    """Through the op, as a module calls it: usual tiles, and what the kernels leave to the reference."""
    shapes = [(0, 3, 16, 1, None), (3, 130, 256, 2, 64)] + ([(300, 200, 4096, 1, None)] if device == "cuda" else [])
    for shape in shapes:
        args = operands(shape, 4)
        wanted = quant_linear_reference(*args, 4, 8, shape[3], torch.bfloat16)
        args = tuple(t.to(device) for t in args)
        if device == "cuda":
            ours = quant_linear(*args, 4, 8, shape[3], torch.bfloat16)
        else:
            ours = triton_linear.quant_linear(*args, 4, TokenQuantizer(8, shape[3]), torch.bfloat16)
        assert_same_bits(ours.cpu(), wanted, shape)
    return len(shapes)


def bytes_moved(tokens: int, out: int, features: int, bits: int, act_bits: int) -> tuple[int, int]:
    """Count the bytes that the interpreter loads and stores for one product, and those of its operands and result. What
    one load asks for twice is counted once: neighbouring threads share it."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    moved = 0
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(ptrs, mask, values) -> None:
        nonlocal moved
        moved += np.unique(ptrs.data[mask.data]).size * values.data.dtype.itemsize

    def counted_load(self, ptrs, mask, *rest):
        made = load(self, ptrs, mask, *rest)
        count(ptrs, mask, made)
        return made

    def counted_store(self, ptrs, value, mask, *rest):
        count(ptrs, mask, value)
        return store(self, ptrs, value, mask, *rest)

    args = operands((tokens, out, features, 1, None), bits)
    args = (args[0].to(torch.float16), *args[1:])
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counted_load, counted_store
    try:
        y = triton_linear.quant_linear(*args, bits, TokenQuantizer(act_bits), torch.float16)
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
    return moved, sum(t.numel() * t.element_size() for t in (*args, y))


def main(device: str, whole_grid: bool) -> None:
    if device == "cpu":
        interpret_bf16_products()
    every = device == "cuda" or whole_grid
    tokens = [(3, 36, 4, 3, kind, torch.float32) for kind in AWKWARD]
    tokens += [(2, 33, bits, 1, "plain", torch.float16) for bits in range(2, 9)]
    tokens += [(1, 2500, 8, 2, "outliers", dtype) for dtype in DTYPES]
    tokens += [(3, 36, 4, 3, kind, torch.float32, 0.9, 0.75) for kind in AWKWARD]
    for case in tokens:
        check_tokens(*case, device=device)
    codes = [(shape, (8, 4), torch.float32, "plain", False) for shape in SHAPES]
    codes += [(SHAPES[0], bits, torch.float32, "plain", False) for bits in BITS]
    codes += [(SHAPES[0], (8, 8), dtype, "plain", False) for dtype in DTYPES]
    codes += [(SHAPES[5], (8, 4), torch.float32, kind, False) for kind in AWKWARD]
    codes += [(SHAPES[0], (4, 8), torch.float32, kind, True) for kind in ("far from zero", "constant", "NaN")]
    codes += [
        (SHAPES[2], (8, 4), dtype, "plain", True) for dtype in (torch.float64, torch.bfloat16)
    ]  # real zero points
    if every:
        codes += [(*case, "plain", False) for case in product(SHAPES, BITS, DTYPES)]
        codes += [(SHAPES[1], (8, 8), *case) for case in product(DTYPES, AWKWARD, (False, True))]
    codes += [(SHAPES[0], (4, 4), dtype, "plain", False, 0.75, 0.9) for dtype in DTYPES]
    for one in codes:
        check_codes(*one, device=device)
    values = [(SHAPES[0], bits, torch.float16) for bits in range(2, 9)]
    values += [(SHAPES[4], 4, dtype) for dtype in DTYPES[:3]] + [(SHAPES[2], 4, torch.bfloat16)]
    values += [((2, 3, 2500, 1, None), 4, torch.bfloat16)]  # several pieces
    if every:
        values += list(product(SHAPES, range(2, 9), DTYPES[:3]))
    for chosen in values:
        check_values(*chosen, device)
    print(len(tokens) + len(codes) + len(values) + check_dispatched(device))


def print_bytes() -> None:
    interpret_bf16_products()
    for call in ((1, 256, 2048, 4, 8), (1, 256, 2048, 4, 16), (4, 256, 1024, 2, 2)):
        print(*call, *bytes_moved(*call))


if __name__ == "__main__":
    print_bytes() if sys.argv[1] == "bytes" else main(sys.argv[1], "all" in sys.argv)
