"""What `benchmark gpu` checks before it measures: bits, CUDA graphs, and NCCL in a group of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit import kernels
from megatron_lowbit.comm.codec import WireFormat
from megatron_lowbit.kernels import hybrid
from megatron_lowbit.kernels.hadamard import hadamard_reference
from megatron_lowbit.kernels.linear import quant_linear_reference
from megatron_lowbit.kernels.quantizer import quantize_tokens_reference
from megatron_lowbit.kernels.reassembly import reassemble_reference
from megatron_lowbit.launch.bench.kernels import SHARES, codec
from megatron_lowbit.quant.affine import choose_qparams, quantize

Row = dict[str, Any]
SHAPES = [(1, 96, 172, 4), (15, 64, 4096, 1), (33, 130, 512, 8), (300, 257, 1024, 1)]  # tokens, out, in, groups
BITS = [(4, 4), (8, 4), (6, 6), (8, 8), (2, 2), (5, 3), (3, 5), (7, 7)]  # activations, weight


def operands(tokens: int, out: int, features: int, weight_bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (x bf16, packed weight, its scale, its zero point) on the CPU, of values with a mean."""
    x = (torch.randn(tokens, features) + 0.5).bfloat16()
    weight = torch.randn(out, features)
    scale, zero_point = choose_qparams(weight, weight_bits)
    return x, kernels.pack_bits(quantize(weight, scale, zero_point, weight_bits), weight_bits), scale, zero_point


def bits(device: str) -> Iterator[Row]:
    """Yield whether every op on a device gives the reference's bits, computed on the CPU."""
    for num_bits in (2, 4, 8):
        x = operands(33, 1, 1000, 4)[0]
        pairs = zip(
            kernels.quantize_tokens(x.to(device), num_bits, 4), quantize_tokens_reference(x, num_bits, 4), strict=True
        )
        yield row(f"quantize_tokens A{num_bits}", all(torch.equal(ours.cpu(), theirs) for ours, theirs in pairs))
    x, index = operands(33, 1, 1376, 4)[0], torch.arange(1408) % 1376
    turned = kernels.hadamard(x.to(device), 2).cpu()
    yield row("hadamard", torch.equal(turned, hadamard_reference(x, 2)))
    merges = index, index, torch.rand(1408), 1376, 1e-5
    gathered = kernels.reassemble(*on(device, (x, *merges))).cpu()
    yield row("reassemble", torch.equal(gathered, reassemble_reference(x, *merges)))
    for act_bits, weight_bits in BITS:
        same = True
        for tokens, out, features, groups in SHAPES:
            args = operands(tokens, out, features, weight_bits)
            for dtype in (torch.bfloat16, torch.float64):
                how = weight_bits, act_bits, groups, dtype
                ours = kernels.quant_linear(*on(device, args), *how).cpu()
                same &= torch.equal(ours, quant_linear_reference(*args, *how))
        yield row(f"quant_linear W{weight_bits}A{act_bits}", same)
    for weight_bits in range(2, 9):
        yield row(f"quant_linear W{weight_bits}A16", near(device, weight_bits))
        yield row(f"quant_linear W{weight_bits}A16, one token in every batch", one_in_all(device, weight_bits))
    for name in SHARES:
        yield from wire(name, device)


def near(device: str, weight_bits: int) -> bool:
    """Return whether weight-only products are within what float32 sums of a piece may err by (triton_linear.py)."""
    args = operands(33, 130, 4096, weight_bits)
    how = weight_bits, kernels.FLOAT_BITS, 1, torch.float32
    ours, wanted = kernels.quant_linear(*on(device, args), *how).cpu().double(), quant_linear_reference(*args, *how)
    sizes = kernels.unpack_bits(args[1], weight_bits, 4096).double() * args[2].double()
    room = 1153 * 2**-23 * (args[0].double().abs() @ sizes.t()) + 2**-23 * wanted.abs()
    return bool(((ours - wanted).abs() <= room).all())


def one_in_all(device: str, weight_bits: int) -> bool:
    """Return whether a token's product has the same bits alone and among 2, 17, 63, 64 and 300."""
    args = on(device, operands(300, 130, 4096, weight_bits))
    how = weight_bits, kernels.FLOAT_BITS, 1, torch.float32
    alone = kernels.quant_linear(args[0][:1], *args[1:], *how)
    return all(torch.equal(kernels.quant_linear(args[0][:n], *args[1:], *how)[:1], alone) for n in (2, 17, 63, 64, 300))


def wire(name: str, device: str) -> Iterator[Row]:
    """Yield whether messages of a format and their sums are the reference's."""
    x = torch.randn(33, 1024).bfloat16()
    first, second = (WireFormat(codec(one, 1024, 2, spread)) for one, spread in ((name, 1.0), ("paper", 2.0)))
    own = first.of_sender(0)
    message = hybrid.pack_flat(x, *own)
    yield row(f"hybrid_pack, {name}", same(kernels.hybrid_pack(*on(device, (x, *own))), message))
    messages, all = torch.stack([message[0]] * 2), first.of_all()
    ours, theirs = torch.empty_like(x, device=device), torch.empty_like(x)
    kernels.hybrid_unpack_reduce_into(*on(device, (messages, *all)), ours)
    hybrid.unpack_reduce_into_flat(messages, *all, theirs)
    yield row(f"hybrid_unpack_reduce_into, {name}", same((ours,), (theirs,)))
    again = messages, *all, *second.of_sender(0)
    wanted = hybrid.requantize_flat(*again)
    yield row(
        f"hybrid_unpack_reduce_requantize, {name}",
        same(kernels.hybrid_unpack_reduce_requantize(*on(device, again)), wanted),
    )


def graphs() -> Iterator[Row]:
    """Yield whether linears replayed from a CUDA graph, on tokens that came later, give the bits of a call."""
    for act_bits, tokens in ((8, 1), (8, 300), (16, 1), (16, 300)):
        args = on("cuda", operands(tokens, 256, 1024, 4))
        how = 4, act_bits, 1, torch.bfloat16
        kernels.quant_linear(*args, *how)  # compiles and measures
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = kernels.quant_linear(*args, *how)
        args[0].copy_(torch.randn_like(args[0]))
        graph.replay()
        yield row(f"W4A{act_bits}, {tokens} tokens", torch.equal(y, kernels.quant_linear(*args, *how)))


def nccl() -> Iterator[Row]:
    """Yield whether the collectives that ours are made of work in a group of one; each returns what it was given."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        message = torch.randint(256, (64, 512), dtype=torch.uint8, device="cuda")
        values = torch.randn(64, 512, device="cuda").bfloat16()
        for name, x in (("uint8", message), ("bfloat16", values)):
            for call in (dist.all_gather_into_tensor, dist.all_to_all_single):
                out = torch.empty_like(x)
                call(out, x)
                yield row(f"{call.__name__}, {name}", torch.equal(out, x))
        out = torch.empty_like(values)
        dist.reduce_scatter_tensor(out, values)
        yield row("reduce_scatter_tensor, bfloat16", torch.equal(out, values))
        total = values.clone()
        dist.all_reduce(total)
        yield row("all_reduce, bfloat16", torch.equal(total, values))
    finally:
        dist.destroy_process_group()


def on(device: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in values)


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True))


def row(name: str, right: bool) -> Row:
    return {"name": name, "right": right}
