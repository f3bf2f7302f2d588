"""The C++ kernels of kernels/csrc/hybrid.cpp: bit for bit what the torch reference makes, and their build."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_inputs import DTYPES, Plan, assert_same_bits, assert_same_messages
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_lowbit import kernels
from megatron_lowbit.kernels import Format, build, cpu, exact, hybrid

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler is installed")
TIERS = [  # as lists of bits and counts; the first of each width alone, with whole and with cut words
    [4, 1],
    [16, 1],
    [16, 9],
    [4, 31],
    [16, 2, 4, 7],
    [16, 7, 4, 36],
    [16, 4, 4, 252],
    [16, 4, 4, 114],  # a large value may be 1 / 8 octave above its token's scale of 118 codes, not of 114
    [8, 5, 3, 2],
    [16, 3, 8, 40, 7, 33, 6, 35, 5, 37, 4, 34, 3, 31, 2, 38],
    [4, 20, 16, 5, 2, 9],  # bf16 not in front
    *([bits, 67] for bits in (2, 3, 5, 6, 7, 8)),
]


@pytest.fixture(autouse=True)
def mode(monkeypatch):
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "cpu")  # an error where they cannot be built


@needs_compiler
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("tiers", TIERS, ids=str)
def test_same_bits_as_the_reference(tiers, per_token):
    for number, tokens in enumerate((0, 1, 3, 17)):
        dtype, ranks = DTYPES[number], (1, 2, 4, 3)[number]
        for turn in range(4):
            plan = Plan(tiers, tokens, per_token, DTYPES[(number + turn) % 4], ranks, shuffled=turn == 3)
            for rank, x in enumerate(plan.x):
                ours = kernels.hybrid_pack(x, *plan.qparams(rank))
                assert_same_messages(ours, hybrid.pack_reference(x, Format(*plan.qparams(rank))), tiers, per_token)
            messages, all_ranks = plan.messages(), plan.qparams(slice(None))
            ours = kernels.hybrid_unpack_reduce(messages, Format(*all_ranks), dtype)
            assert_same_bits(ours, hybrid.unpack_reduce_reference(messages, Format(*all_ranks), dtype))
            second = Plan(TIERS[0] if len(plan.order) == 1 else [16, 1, 4, len(plan.order) - 1], 1, turn > 1, dtype, 1)
            ours = kernels.hybrid_unpack_reduce_requantize(messages, *all_ranks, *second.qparams(0))
            reference = hybrid.requantize_reference(messages, Format(*all_ranks), Format(*second.qparams(0)))
            assert_same_messages(ours, reference, second.tiers, second.per_token)


@needs_compiler
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_rows_and_threads(dtype, per_token):
    """Ascending runs, more in some blocks than in others, which AVX-512 permutes in registers; work for two threads."""
    plan = Plan([16, 16, 5, 70, 4, 700, 3, 200, 2, 38], 70, per_token, dtype, 3)
    messages, all_ranks = plan.messages(), plan.qparams(slice(None))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours = kernels.hybrid_pack(plan.x[0], *plan.qparams(0))
            assert_same_messages(
                ours, hybrid.pack_reference(plan.x[0], Format(*plan.qparams(0))), plan.tiers, per_token
            )
            ours = kernels.hybrid_unpack_reduce(messages, Format(*all_ranks), dtype)
            assert_same_bits(ours, hybrid.unpack_reduce_reference(messages, Format(*all_ranks), dtype))
            ours = kernels.hybrid_unpack_reduce_requantize(messages, *all_ranks, *plan.qparams(0))
            reference = hybrid.requantize_reference(messages, Format(*all_ranks), Format(*plan.qparams(0)))
            assert_same_messages(ours, reference, plan.tiers, per_token)
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
@needs_compiler
def test_older_processors(monkeypatch, tmp_path):
    """Without AVX-512: what the compiler makes of the same source."""
    if platform.machine() != "x86_64":
        pytest.skip("of another kind")
    monkeypatch.setattr(build, "FLAGS", ["-march=x86-64-v3" if "march" in flag else flag for flag in build.FLAGS])
    monkeypatch.setattr(cpu.kernels_of_cpu, "loaded", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for tiers in (TIERS[8], TIERS[9]):
        for per_token in (False, True):
            test_same_bits_as_the_reference(tiers, per_token)
    for carrier_bits in (8, 16):
        test_exact_sums(65, carrier_bits)


@needs_compiler
@pytest.mark.parametrize("carrier_bits", [8, 16])
@pytest.mark.parametrize("features", [1, 64, 65, 130])
def test_exact_sums(features, carrier_bits):
    g = torch.Generator().manual_seed(features)
    center, step = 0.1 * torch.randn(features, generator=g), 0.01 + torch.rand(features, generator=g)
    largest = (2 ** (carrier_bits - 1) - 1) // 3
    x = torch.randn(9, features, generator=g) * largest * step / 2  # some beyond the largest code
    x[1] = center + 1.5 * step  # halfway between codes
    x[2, -1], x[3, 0], x[4, features // 2] = torch.nan, torch.inf, -torch.inf
    x[5], x[6] = 6e4, -6e4
    wider = torch.cat([x, x], 1)[:, :features]
    for dtype in DTYPES:
        for own in (x.to(dtype), wider.to(dtype)):
            ours = kernels.exact_encode(own, center, step, largest, carrier_bits)
            reference = exact.encode_reference(own, center, step, largest, carrier_bits)
            assert ours[0].dtype == reference[0].dtype
            assert torch.equal(ours[0], reference[0]) and torch.equal(ours[1], reference[1])
        assert reference[1][1] > features and reference[1][2] == 3
        total = 3 * reference[0]
        arguments = total, 3 * center, step, carrier_bits, dtype
        assert_same_bits(kernels.exact_decode(*arguments), exact.decode_reference(*arguments))


@needs_compiler
def test_sums_below_the_normal_numbers():
    """bf16 keeps what the processor's own conversion takes for zero."""
    plan = Plan([16, 7, 6, 60, 4, 100], 9, True, torch.bfloat16, 2)
    messages = plan.messages()
    plan.scale *= 1e-38
    all_ranks = plan.qparams(slice(None))
    reference = hybrid.unpack_reduce_reference(messages, Format(*all_ranks), torch.bfloat16)
    assert ((reference != 0) & (reference.abs() < torch.finfo(torch.bfloat16).tiny)).any()
    assert_same_bits(kernels.hybrid_unpack_reduce(messages, Format(*all_ranks), torch.bfloat16), reference)


@needs_compiler
@pytest.mark.parametrize("smallest", [0.01, 2.0**-130])  # the reciprocal of the latter overflows
def test_exact_codes_next_to_halves(smallest):
    g = torch.Generator().manual_seed(0)
    step = smallest + torch.rand(4096, generator=g)
    step[0] = smallest
    half = (torch.randint(-40, 40, (8, 4096), generator=g) + 0.5) * step
    x = torch.cat([half, *(half.nextafter(torch.full_like(half, end)) for end in (-1e9, 1e9))])
    ours, reference = (
        encode(x, torch.zeros(4096), step, 42, 8) for encode in (kernels.exact_encode, exact.encode_reference)
    )
    assert torch.equal(ours[0], reference[0]) and torch.equal(ours[1], reference[1])


@needs_compiler
def test_strides():
    plan = Plan([16, 7, 4, 36], 9, False, torch.float32, 2)
    x, expected = plan.x[0], hybrid.pack_reference(plan.x[0], Format(*plan.qparams(0)))
    wider = torch.full((9, 60), torch.nan)
    wider[:, :43] = x
    for strided in (wider[:, :43], x.t().contiguous().t(), torch.stack([x, x], 2)[:, :, 0]):
        assert_same_messages(kernels.hybrid_pack(strided, *plan.qparams(0)), expected, plan.tiers, False)
    messages, all_ranks = plan.messages(), plan.qparams(slice(None))
    expected = hybrid.unpack_reduce_reference(messages, Format(*all_ranks), torch.float32)
    ranks, tokens, row = messages.shape
    apart = torch.full((tokens, ranks, row + 3), 255, dtype=torch.uint8)
    apart[:, :, :row] = messages.transpose(0, 1)
    for strided in (apart.transpose(0, 1)[:, :, :row], apart.transpose(0, 1), torch.stack([messages] * 2, 3)[..., 0]):
        assert_same_bits(kernels.hybrid_unpack_reduce(strided, Format(*all_ranks), torch.float32), expected)


@needs_compiler
def test_what_the_kernels_do_not_take_goes_to_the_reference():
    plan = Plan([16, 2, 4, 7], 5, False, torch.float32, 1)
    scale, zero_point, order, *rest = plan.qparams(0)
    doubled = order.clone()
    doubled[0] = order[1]
    for odd in ((plan.x[0].int(), order), (plan.x[0], doubled)):
        x, order = odd
        ours = kernels.hybrid_pack(x, scale, zero_point, order, *rest)
        assert_same_messages(ours, hybrid.pack_reference(x, Format(scale, zero_point, order, *rest)), plan.tiers, False)
    with pytest.raises((IndexError, RuntimeError)):
        kernels.hybrid_pack(plan.x[0], scale, zero_point, order + 100, *rest)
    with pytest.raises((RuntimeError, ValueError)):  # one message, two ranks
        two = torch.stack([scale, scale]), torch.stack([zero_point, zero_point])
        kernels.hybrid_unpack_reduce(plan.messages(), Format(*two, plan.order, *rest), torch.float32)


@needs_compiler
@pytest.mark.parametrize("per_token", [False, True])
def test_a_plan_that_changes_in_place(per_token):
    """The kernels keep what they made of a plan; memory that says something else is another plan."""
    plan = Plan([16, 2, 5, 30, 4, 68], 9, per_token, torch.bfloat16, 2)
    kept = torch.empty(2, len(plan.order)), torch.empty(2, len(plan.order)), torch.empty_like(plan.order)
    changes = (
        lambda: None,
        lambda: plan.scale[1].mul_(1.5),
        lambda: plan.zero_point[0].sub_(1),
        lambda: plan.order.copy_(plan.order.flip(0)),
        lambda: setattr(plan, "tiers", [16, 2, 5, 29, 4, 69]),
        lambda: setattr(plan, "per_token", not plan.per_token),
    )
    for change in changes:
        change()
        for own, of in zip(kept, (plan.scale, plan.zero_point, plan.order), strict=True):
            own.copy_(of)
        scale, zero_point, order = kept
        how = order, plan.tiers, plan.per_token
        for rank, x in enumerate(plan.x):
            ours = kernels.hybrid_pack(x, scale[rank], zero_point[rank], *how)
            assert_same_messages(
                ours, hybrid.pack_reference(x, Format(*plan.qparams(rank))), plan.tiers, plan.per_token
            )
        messages, all_ranks = plan.messages(), plan.qparams(slice(None))
        ours = kernels.hybrid_unpack_reduce(messages, Format(scale, zero_point, *how), torch.float32)
        assert_same_bits(ours, hybrid.unpack_reduce_reference(messages, Format(*all_ranks), torch.float32))


@needs_compiler
def test_plans_of_many_threads():
    """Each with plans of its own and with shared ones, while all of them are made."""
    plans = [Plan([16, 2, 4, 60 + number % 5], 5, True, torch.float32, 1) for number in range(40)]
    expected = [hybrid.pack_reference(plan.x[0], Format(*plan.qparams(0))) for plan in plans]

    def work(first):
        order = plans[first:] + plans[:first]
        return [kernels.hybrid_pack(plan.x[0], *plan.qparams(0)) for _ in range(5) for plan in order]

    with ThreadPoolExecutor(4) as threads:
        for first, results in zip((0, 10, 20, 0), threads.map(work, (0, 10, 20, 0)), strict=True):
            for number, ours in enumerate(results):
                assert_same_messages(ours, expected[(number + first) % 40], plans[(number + first) % 40].tiers, True)


@needs_compiler
def test_registered_ops():
    plan = Plan([16, 2, 4, 7], 5, True, torch.float32, 2)
    messages, all_ranks = plan.messages(), plan.qparams(slice(None))
    checks = ("test_schema", "test_faketensor")
    library.opcheck(kernels.hybrid_pack, (plan.x[0], *plan.qparams(0)), test_utils=checks)
    into = messages, *all_ranks, torch.empty(messages.shape[1], len(plan.order), dtype=torch.bfloat16)
    library.opcheck(kernels.hybrid_unpack_reduce_into, into, test_utils=checks)
    version = into[-1]._version
    kernels.hybrid_unpack_reduce_into(*into)
    assert into[-1]._version == version + 1, "autograd has to know that it was overwritten"
    encoded = plan.x[0], plan.scale[0], plan.scale[0], 63, 16
    library.opcheck(kernels.exact_encode, encoded, test_utils=checks)
    decoded = kernels.exact_encode(*encoded)[0], plan.scale[0], plan.scale[0], 16, torch.bfloat16
    library.opcheck(kernels.exact_decode, decoded, test_utils=checks)
    arguments = (messages, *all_ranks, *plan.qparams(0))
    library.opcheck(kernels.hybrid_unpack_reduce_requantize, arguments, test_utils=checks)
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        assert kernels.hybrid_pack(fakes.from_tensor(plan.x[0]), *plan.qparams(0))[0].shape == messages.shape[1:]


def test_modes(monkeypatch):
    plan = Plan([16, 2, 4, 7], 5, False, torch.float32, 1)
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "reference")
    assert cpu._library() is None
    ours = kernels.hybrid_pack(plan.x[0], *plan.qparams(0))
    assert torch.equal(ours[0], hybrid.pack_reference(plan.x[0], Format(*plan.qparams(0)))[0])
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "fastest")
    with pytest.raises(RuntimeError, match="MEGATRON_LOWBIT_KERNELS=fastest: use auto, reference, triton or cpu"):
        kernels.hybrid_pack(plan.x[0], *plan.qparams(0))


# Packs and unpacks twice, and prints whether the C++ ran and what came out.
SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from megatron_lowbit import kernels
from megatron_lowbit.kernels import cpu
assert not cpu.kernels_of_cpu.loaded  # nothing is built at import
x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
plan = torch.full((50,), 0.3), torch.full((50,), 7.0), torch.arange(50), [16, 3, 4, 47], False
for _ in range(2):
    message, tally = kernels.hybrid_pack(x, *plan)
format = kernels.Format(plan[0][None], plan[1][None], *plan[2:])
total = kernels.hybrid_unpack_reduce(message[None], format, torch.float32)
print(cpu._library() is not None, message.tolist(), tally.tolist(), total.tolist())
"""


def start(cache: Path, **environment: str) -> subprocess.Popen:
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "MEGATRON_LOWBIT_KERNELS": "auto"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", SCRIPT], cwd=ROOT, env=env, **pipes)


def finish(process: subprocess.Popen) -> tuple[str, str, list[str]]:
    """(whether the C++ ran, the results, the lines on stderr)"""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    ran, _, results = out.partition(" ")
    return ran, results, err.splitlines()


@pytest.mark.slow
def test_without_a_compiler_that_works(tmp_path):
    """The reference runs, and says so once; asked for by name, the kernels are an error."""
    broken = start(tmp_path, CXX="/bin/false")
    reference = start(tmp_path, MEGATRON_LOWBIT_KERNELS="reference")
    ran, results, lines = finish(broken)
    assert ran == "False" and finish(reference) == ("False", results, [])
    assert len(lines) == 1 and lines[0].startswith("CPU kernels: /bin/false failed") and "reference" in lines[0]
    _, err = (asked := start(tmp_path, CXX="/bin/false", MEGATRON_LOWBIT_KERNELS="cpu")).communicate(timeout=600)
    assert asked.returncode == 1 and "RuntimeError: MEGATRON_LOWBIT_KERNELS=cpu: /bin/false failed" in err


@needs_compiler
@pytest.mark.slow
def test_processes_that_start_at_once_build_one_library(tmp_path):
    results = [finish(process) for process in [start(tmp_path) for _ in range(3)]]
    assert {ran for ran, _, _ in results} == {"True"} and len({out for _, out, _ in results}) == 1
    assert not any(lines for _, _, lines in results)
    assert len(list((tmp_path / "megatron_lowbit").glob("*.so"))) == 1
    blocked = tmp_path / "file"  # no folder: a cache that cannot be written
    blocked.write_text("")
    assert finish(start(blocked)) == results[0]
