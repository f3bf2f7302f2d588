"""The C++ products: every processor's path makes the oracle's bits, and keeps its sums in registers."""

from __future__ import annotations

import copy
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import linear_fuzz
import linear_oracle
import pytest
import torch
from kernel_inputs import assert_same_bits
from safetensors.torch import load_file, save_file
from sanitizers import sanitized

from megatron_lowbit import kernels
from megatron_lowbit.kernels import build, panels, reassembly
from megatron_lowbit.kernels.linear import quant_linear_reference
from megatron_lowbit.layers.linear import QuantLinear
from megatron_lowbit.quant.affine import QuantizedWeight

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler is installed")
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86-64")

# What multiplies: flags that make the compiler leave out the better instructions.
PATHS = {
    "avx512_vnni": ["-mno-amx-int8"],
    "avx512": ["-mno-amx-int8", "-mno-avx512vnni"],
    "avx_vnni": ["-march=x86-64-v3", "-mavxvnni"],
    "avx2": ["-march=x86-64-v3"],
    "plain": ["-march=x86-64"],
}


def test_random_products(monkeypatch):
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "cpu")
    done = linear_fuzz.fuzz(300, 0)
    assert sum(done.values()) == 300 and min(done.values()) > 15


@pytest.mark.slow
def test_twenty_thousand_products(monkeypatch):
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "cpu")
    assert sum(linear_fuzz.fuzz(20_000, 1).values()) == 20_000


@pytest.mark.slow
@needs_x86
@pytest.mark.parametrize("path", PATHS)
def test_other_processors(path, tmp_path):
    """The same bits from a process whose kernels were built without some of this processor's instructions."""
    environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(linear_fuzz.__file__).parent)}
    command = [sys.executable, "-W", "ignore", linear_fuzz.__file__, "300", "2", *PATHS[path]]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=1800)
    if done.returncode == -4:  # SIGILL: an instruction that this processor does not have
        pytest.skip(f"this processor cannot run the path {path}")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["calls"].values()) == 300
    if path in ("avx2", "plain", "avx_vnni") or "avx512_vnni" in Path("/proc/cpuinfo").read_text():
        assert found["path"] == path


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """Address and undefined behaviour, over 2,000 products."""
    done = sanitized(linear_fuzz.__file__, 2000, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sum(json.loads(done.stdout.splitlines()[-1])["calls"].values()) == 2000


@pytest.mark.parametrize("inputs", [256, 16384])
@pytest.mark.parametrize("bits", [4, 7, 8])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_the_largest_codes(tokens, bits, inputs):
    """All codes at their largest: where bytes saturate, 32 bits overflow or float32 rounds, these are wrong."""
    x = torch.full((tokens, inputs), 255.0)
    x[:, 0] = 0
    codes = torch.full((70, inputs), 2**bits - 1, dtype=torch.uint8)
    scale, zero = torch.ones(70, 1), torch.zeros(70, 1)
    y = kernels.quant_linear(x, kernels.pack_bits(codes, bits), scale, zero, bits, 8, 1, torch.float64)
    assert (y == 255 * (inputs - 1) * (2**bits - 1)).all()


def test_a_block_that_32_bits_cannot_hold():
    """66,100 inputs of the largest 8-bit codes: more than 2^32, so the reference computes it."""
    inputs = 66_100
    x = torch.full((2, inputs), 255.0)
    x[:, 0] = 0
    codes = torch.full((3, inputs), 255, dtype=torch.uint8)
    y = kernels.quant_linear(x, codes, torch.ones(3, 1), torch.zeros(3, 1), 8, 8, 1, torch.float64)
    assert not panels.fits(8, inputs, 1) and (y == 255 * 255 * (inputs - 1)).all() and 255 * 255 * inputs > 2**32


@pytest.mark.parametrize("act_bits, inputs, act_groups", [(8, 4173, 1), (8, 8208, 8), (16, 2061, 1), (16, 4112, 1)])
def test_long_tokens(act_bits, inputs, act_groups, monkeypatch):
    """Tokens of one block and of several: tile registers take the first in parts, whose sums wait in memory."""
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "cpu")
    random = torch.Generator().manual_seed(3)
    x = torch.randn(70, inputs, generator=random).to(torch.bfloat16)
    codes = torch.randint(0, 16, (330, inputs), dtype=torch.uint8, generator=random)
    scale = torch.rand(330, 1, generator=random)
    zero = torch.randint(0, 16, (330, 1), generator=random).float()
    rows, layout = kernels.pack_bits(codes, 4), (4, inputs, kernels.blocks_of(act_bits, act_groups, 1), act_bits == 16)
    ordered = kernels.panels_of(rows, *layout)
    y = kernels.quant_linear(x, ordered, scale, zero, 4, act_bits, act_groups, torch.bfloat16)
    if act_bits == 16:
        linear_fuzz.weight_only(x, ordered, rows, (scale, zero, 4, 16, 1), y, torch.bfloat16)
    else:
        assert_same_bits(y, linear_oracle.quant_linear(x, codes, scale, zero, 8, act_groups, torch.bfloat16))


@pytest.mark.parametrize("act_groups", [1, 4])
@pytest.mark.parametrize("tokens", [3, 16, 96])
def test_outputs_near_a_tie(tokens, act_groups, monkeypatch):
    """So many bf16 outputs that some lie nearer to a tie than float32 can tell, by way of which most are computed."""
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "cpu")
    random = torch.Generator().manual_seed(act_groups)
    outputs, inputs = 1_000_000 // tokens, 64
    x = torch.randn(tokens, inputs, generator=random).to(torch.bfloat16)
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, generator=random)
    scale = torch.rand(outputs, 1, generator=random)
    zero = torch.randint(0, 16, (outputs, 1), generator=random).float()
    linear = kernels.pack_bits(codes, 4), scale, zero, 4, 8, act_groups, torch.bfloat16
    assert_same_bits(kernels.quant_linear(x, *linear), quant_linear_reference(x, *linear))


@pytest.mark.parametrize("act_groups", [1, 4])
@pytest.mark.parametrize("tokens", [3, 16, 40])
def test_outputs_that_float32_does_not_hold(tokens, act_groups, monkeypatch):
    """Scales of channels that make bf16 outputs subnormal, zero, infinite or NaN, beside common ones."""
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "cpu")
    random = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, 128, generator=random).to(torch.bfloat16)
    codes = torch.randint(0, 16, (70, 128), dtype=torch.uint8, generator=random)
    scale = torch.tensor([1.0, 1e-41, 1e-45, 1e-38, 3e38, 1e36, float("inf"), float("nan")]).repeat(9)[:70, None]
    zero = torch.full((70, 1), 7.0)
    linear = kernels.pack_bits(codes, 4), scale, zero, 4, 8, act_groups, torch.bfloat16
    y = kernels.quant_linear(x, *linear)
    assert_same_bits(y, linear_oracle.quant_linear(x, codes, scale, zero, 8, act_groups, torch.bfloat16))
    assert y.isinf().any() and y.isnan().any() and (y[:, 1].abs() < torch.finfo(torch.bfloat16).tiny).all()


TILES = [(4, 1), (4, 4), (4, 12), (8, 12), (6, 10), (2, 6)]  # bits of weights, tokens
TILES_SOURCE = """
#include "tiles.h"
#include "weight_only.h"
void* keep[] = {%s, (void*)pair_tile<4, 4>};
"""


@needs_x86
def test_sums_stay_in_registers(tmp_path):
    """No vector is stored to the stack inside the loop over a block, as GCC does when rows are a plain loop; and codes
    are fetched ahead of it."""
    source, library = tmp_path / "tiles.cpp", tmp_path / "tiles.so"
    objdump = shutil.which("objdump")
    if not objdump:
        pytest.skip("no objdump is installed")
    source.write_text(TILES_SOURCE % ", ".join(f"(void*)tile<{bits}, {rows}>" for bits, rows in TILES))
    flags = [flag for flag in build.FLAGS if "march" not in flag]
    flags += ["-march=sapphirerapids", "-mno-amx-int8", f"-I{build.SOURCES['linear'].parent}"]
    done = subprocess.run([*build._compiler(), *flags, source, "-o", library], capture_output=True)
    if done.returncode:
        pytest.skip("this compiler does not know these processors")
    text = subprocess.run([objdump, "-dC", "--no-show-raw-insn", library], capture_output=True, text=True).stdout
    parts = [part.strip().splitlines() for part in text.split("\n\n")]
    functions = [lines for lines in parts if lines and re.match(r".*(::|_)tile<", lines[0])]
    assert len(functions) == len(TILES) + 1
    for function in functions:
        loop = innermost_loop(function, r"vpdpbusd|vdpbf16ps")
        assert len([line for line in loop if re.search(r"vpdpbusd|vdpbf16ps", line)]) >= 16
        assert [line for line in loop if "prefetcht1" in line]
        assert not [line for line in loop if re.search(r"%[yz]mm\d+,-?(0x)?[0-9a-f]*\(%r[sb]p\)", line)], function[0]


def innermost_loop(lines: list[str], instruction: str) -> list[str]:
    """The lines of the shortest loop around the first such instruction."""
    addresses = [int(m.group(1), 16) if (m := re.match(r"\s*([0-9a-f]+):", line)) else None for line in lines]
    first = next(i for i, line in enumerate(lines) if re.search(instruction, line))
    loops = []
    for end, line in enumerate(lines):
        jump = re.search(r"\sj[a-z]+\s+([0-9a-f]+)", line)
        start = addresses.index(int(jump.group(1), 16)) if jump and int(jump.group(1), 16) in addresses else end
        if start <= first < end:
            loops.append(lines[start : end + 1])
    return min(loops, key=len)


@pytest.mark.parametrize("act_bits", [4, 8, 16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_panels_are_rows_in_another_order(bits, act_bits):
    codes = torch.randint(0, 2**bits, (70, 172), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    rows = kernels.pack_bits(codes, bits)
    layout = bits, 172, 4, act_bits == 16
    ordered = kernels.panels_of(rows, *layout)
    assert ordered is not None and ordered.dim() == 1
    assert torch.equal(kernels.rows_of(ordered, 70, *layout), rows)
    assert torch.equal(kernels.codes_of(ordered, 70, *layout), codes)


def test_ordering_allocates_the_panels_alone():
    """What torch would unpack on the way left holes in memory, 40 MiB of them in a model of 374 million parameters."""
    rows = torch.zeros(70, 48, dtype=torch.uint8)
    with torch.profiler.profile() as seen:
        assert kernels.panels_of(rows, 4, 96, 1, False) is not None
    assert [event.name for event in seen.events()] == ["aten::empty"]


def test_rows_of_another_length():
    with pytest.raises(ValueError, match="rows of 47 bytes do not hold 96 codes of 4 bits"):
        kernels.panels_of(torch.zeros(70, 47, dtype=torch.uint8), 4, 96, 1, False)


def module(act_bits: int = 8) -> QuantLinear:
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(0))
    return QuantLinear(QuantizedWeight.from_float(weight, 4), None, act_bits, 2)


def test_a_linear_keeps_one_copy():
    """After its first forward the panels are all there is; a state dict has the rows, under its first key."""
    linear = module()
    rows, x = linear.packed_weight.clone(), torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    y = linear(x)
    assert linear._panels is not None and "packed_weight" not in linear._buffers
    assert linear._panels.numel() == 128 * 96 // 2 + 2 * 128 * 4  # outputs padded to 128, sums of two blocks
    assert torch.equal(linear(x), y)
    state = linear.state_dict()
    assert next(iter(state)) == "packed_weight" and torch.equal(state["packed_weight"], rows)
    assert torch.equal(linear(x), y) and torch.equal(linear.packed_weight, rows)
    assert torch.equal(linear(x), y) and linear._panels is not None


@pytest.mark.parametrize("act_bits", [4, 16])
def test_what_looks_at_a_linear_that_has_run(act_bits, tmp_path):
    """Copies, pickles, loads, moves and gradients see the weight as it is stored."""
    linear, other = module(act_bits), module(act_bits)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        y = linear(x).clone()
    assert torch.equal(copy.deepcopy(linear)(x), y)
    linear(x)
    torch.save(linear, tmp_path / "linear.pt")
    assert torch.equal(torch.load(tmp_path / "linear.pt", weights_only=False)(x), y)
    other(x)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), y)
    linear(x)
    assert torch.equal(linear.to(torch.bfloat16).to("cpu")(x), y)
    panels = linear._panels
    assert panels is not None and linear.to("cpu").bfloat16()._panels is panels  # ordered once, not at every patch
    assert copy.deepcopy(linear).to("meta")._panels is None and torch.equal(linear(x), y)
    x.requires_grad_()
    linear(x).sum().backward()
    weight = kernels.dequantize(kernels.unpack_bits(linear.packed_weight, 4, 96), linear.scale, linear.zero_point)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 96))


def test_the_reference_takes_over_panels(monkeypatch):
    """$MEGATRON_LOWBIT_KERNELS=reference in a process whose linears have run with the kernels."""
    linear, x = module(), torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    y = linear(x)
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "reference")
    assert torch.equal(linear(x), y)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    x = torch.randn(70, 512, generator=torch.Generator().manual_seed(1))
    codes = torch.randint(0, 16, (1000, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    scale, zero = torch.full((1000, 1), 0.1), torch.full((1000, 1), 7.0)
    try:
        torch.set_num_threads(threads)
        y = kernels.quant_linear(x, kernels.pack_bits(codes, 4), scale, zero, 4, 8, 4, torch.bfloat16)
    finally:
        torch.set_num_threads(1)
    assert_same_bits(y, linear_oracle.quant_linear(x, codes, scale, zero, 8, 4, torch.bfloat16))


@pytest.mark.parametrize("eps", [1e-5, kernels.NO_NORM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_reassembly(tokens, dtype, eps):
    """The reference's bits: split, merged and copied channels, a NaN, rows that lie apart."""
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 200, generator=g).to(dtype)[:, :173] * 3
    if tokens > 1:
        x[1, 5] = float("nan")
    src = torch.randint(0, 173, (210,), generator=g)
    dst = torch.cat([torch.arange(190), torch.randint(0, 190, (20,), generator=g)])
    arguments = src, dst, torch.rand(210, generator=g), 190, eps
    assert_same_bits(kernels.reassemble(x, *arguments), reassembly.reassemble_reference(x, *arguments))


@pytest.mark.parametrize("place", ["src", "dst"])
def test_an_index_that_is_not_there(place):
    """The kernel reads and writes nothing beside the token; the error is torch's."""
    src, dst = torch.arange(8), torch.arange(8)
    (src if place == "src" else dst)[7] = 8
    with pytest.raises((IndexError, RuntimeError), match=r"out of range|bounds"):
        kernels.reassemble(torch.ones(2, 8), src, dst, torch.ones(8), 7)


@pytest.mark.parametrize("bits, groups", [(1, 1), (9, 1), (4, 0), (4, 3)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tokens_that_do_not_fit(bits, groups, backend, monkeypatch):
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", backend)
    with pytest.raises(ValueError, match=r"is not in 2\.\.8|groups do not divide"):
        kernels.quantize_tokens(torch.ones(2, 8), bits, groups)


def test_norm_and_reassembly_against_float64():
    """Half an ulp of float32 for the factor and for each of two products."""
    g = torch.Generator().manual_seed(0)
    x, gain = torch.randn(9, 173, generator=g) * 5, torch.rand(173, generator=g)
    index = torch.randperm(173, generator=g)
    y = kernels.reassemble(x, index, torch.arange(173), gain, 173, 1e-5)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt()
    exact = exact[:, index] * gain.double()
    assert ((y - exact).abs() <= 3 * 2.0**-24 * exact.abs()).all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
def test_rows_of_a_file_leave_memory(tmp_path):
    """The pages of an artifact's file are given back once panels are made, and are read again when asked for."""
    names = ("ours", "written_to")
    save_file({name: torch.full((4096, 2048), 7, dtype=torch.uint8) for name in names}, tmp_path / "weight.safetensors")
    rows, changed = (load_file(tmp_path / "weight.safetensors")[name] for name in names)
    assert rows.sum() == changed.sum() == 7 * rows.numel()
    before = file_pages()
    kernels.forget_pages(rows)
    assert before - file_pages() > 0.99 * rows.numel()
    assert rows.sum() == 7 * rows.numel()
    changed[2000, 5] = 9  # a page of this process's own, which no file has
    kernels.forget_pages(changed)
    assert changed[2000, 5] == 9 and changed.sum() == 7 * rows.numel() + 2
    own = torch.full((4096, 2048), 7, dtype=torch.uint8)
    kernels.forget_pages(own)
    assert own.sum() == 7 * own.numel()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled(fullgraph):
    """A compiled linear orders its weight, too, and computes the same."""
    linear, x = module(), torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    y = linear(x)
    linear.packed_weight  # noqa: B018  back to rows
    with torch.no_grad():
        compiled = torch.compile(linear, backend="eager", fullgraph=fullgraph)
        assert torch.equal(compiled(x), y) and torch.equal(compiled(x), y) and linear._panels is not None


def file_pages() -> int:
    """Bytes of files that are in this process's memory."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return int(line.split()[1]) * 1024
