"""The machine code of Triton's kernels, compiled for GPUs that are not here and read (gpu_objects.py)."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec

import pytest

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx1100")
# The instruction that a product has to be made of. On sm_100 Triton multiplies integers with the tensor memory's
# UTCIMMA from 3.9 on, and with a warp's IMMA before.
CODES = ("IMMA.16832.S8.S8", "IGMMA.64x", "IMMA", "v_mfma_i32_", "v_mfma_i32_", "v_wmma_i32_")
VALUES = ("HMMA.16816.F32", "HGMMA.64x", "UTCHMMA", "v_mfma_f32_16x", "v_mfma_f32_16x", "v_wmma_f32_")
OF_CODES, OF_VALUES = (dict(zip(TARGETS, names, strict=True)) for names in (CODES, VALUES))
OF_FLOAT32 = re.compile(r"v_mfma_f32_16x16x4_?f32$")
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes that a program may have; AMD: 64 KiB


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    os.environ.pop("TRITON_CACHE_DIR") if before is None else os.environ.update(TRITON_CACHE_DIR=before)


def check(target: str, names: list[str] | None = None) -> dict[str, tuple[str, ...]]:
    """Compile what `names` begin (None: all) and return its tensor-core instructions."""
    import gpu_objects

    instructions = {}
    for name, launch in gpu_objects.launches(target).items():
        if names is not None and not any(name.startswith(one) for one in names):
            continue
        found = gpu_objects.read(gpu_objects.compiled(launch, gpu_objects.TARGETS[target]))
        assert found.registers > 0 and found.spills == found.stack == 0, (target, name, found)
        assert found.shared <= SHARED.get(target, 64 * 1024), (target, name, found)
        multiplies = name.endswith((": split", ": whole")) and "float32" not in name
        if multiplies:
            wanted = (OF_VALUES if "A16" in name else OF_CODES)[target]
            assert found.matrix and all(wanted in one for one in found.matrix), (target, name, found)
        else:  # products of float32 use none either, but for AMD's that take float32 as it is
            assert all(OF_FLOAT32.search(one) for one in found.matrix), (target, name, found)
        instructions[name] = found.matrix
    return instructions


def test_linears_for_an_h100():
    """No spill, no local memory; integer products by groups of warps, and float products with the same number of
    channels an instruction for few and for many tokens: with the pieces, that is the order of their sums."""
    products = ["W4A8 16 tokens", "W4A8 1024 tokens: whole", "W4A8 1024 tokens: sums", "W4A16 16 tokens"]
    found = check("sm_90", [*products, "W4A16 1024 tokens: whole", "quantize_tokens", "hybrid per-token: pack"])
    assert len(found) == 3 + 1 + 1 + 3 + 1 + 1 + 1
    of_values = {name: one[0] for name, one in found.items() if "W4A16" in name and one}
    assert {one.split(".")[1].split("x")[-1] for one in of_values.values()} == {"16"} and len(of_values) == 2


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "sm_90"])
def test_products(target):
    float32 = ["W4A16 float32 16 tokens: split", "W4A16 float32 1024 tokens: whole"]
    assert len(check(target, ["W4A8 16 tokens: split", "W4A8 1024 tokens: whole", *float32])) == 4


@pytest.mark.parametrize("target", TARGETS)
def test_rotations(target):
    assert len(check(target, ["11008 channels in 8 groups", "128 channels in 1 group"])) == 2


@pytest.mark.parametrize("target", TARGETS)
def test_reassembly(target):
    assert len(check(target, ["norm and reassembly", "reassembly without a norm"])) == 3


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel(target):
    assert len(check(target)) >= 60


TRIED = [(4, 8, 1, 15), (4, 8, 1, 40), (4, 8, 1, 1024), (4, 8, 8, 1024), (4, 16, 1, 16), (4, 16, 1, 1024)]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_that_is_tried(target):
    """One for which a target has no shared memory is passed over; the others spill nowhere."""
    import gpu_objects
    import torch

    from megatron_lowbit.kernels import gpu_tiles, triton_linear

    for bits, act_bits, groups, tokens in TRIED:
        x = torch.empty((tokens, 4096), dtype=torch.bfloat16, device="meta")
        shape = triton_linear.problem(x, torch.empty((4096, 1), device="meta"), bits, act_bits, groups)
        tried = gpu_tiles.candidates(shape, tokens)
        for tile in tried:
            with gpu_objects.recorded(target) as made:
                gpu_objects.linear(tokens, bits, act_bits, act_groups=groups, tile=tile)
            product = next(launch for launch in made if "PER" in launch.arguments and "ACC" in launch.arguments)
            found = gpu_objects.read(gpu_objects.compiled(product, gpu_objects.TARGETS[target]))
            room = SHARED.get(target, 64 * 1024)
            assert found.shared > room or found.spills == found.stack == 0, (target, tile, found)
            assert found.shared <= room or tile != tried[0], "the usual tile has room everywhere"
