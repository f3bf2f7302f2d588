"""megatron-lowbit benchmark gpu: what can be told of it without a GPU, and all of it with one."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from commands import COMMAND, run_here, run_there

from megatron_lowbit.kernels import dequantize, quant_linear, unpack_bits
from megatron_lowbit.launch.bench import gpu, gpu_block, gpu_checks, gpu_linears
from megatron_lowbit.launch.bench.config import BenchmarkGpuConfig


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    code, stdout, stderr = run_there(*COMMAND, "benchmark", "gpu", f"output_dir={tmp_path / 'new'}")
    assert code == 2 and stdout == "" and stderr.count("\n") == 1
    assert "benchmark gpu needs a GPU that PyTorch sees" in stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [("tokens=[0]", "tokens"), ("seconds=0", "seconds"), ("tp=2", "tp=2 changes nothing here"), ("repeat=4", "repeat")],
)
def test_bad_input(capsys, argument, message):
    assert run_here("benchmark", "gpu", argument) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_bits_are_compared_with_the_reference(monkeypatch):
    """On the CPU its own kernels are what is compared; one wrong bit is told."""
    monkeypatch.setattr(gpu_checks, "SHAPES", gpu_checks.SHAPES[:1])
    monkeypatch.setattr(gpu_checks, "BITS", gpu_checks.BITS[:2])
    torch.manual_seed(0)
    assert all(row["right"] for row in gpu_checks.bits("cpu"))

    def off_by_one_bit(*args):
        y = quant_linear(*args)
        y.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[y.element_size()])[0, 0] ^= 1
        return y

    monkeypatch.setattr(gpu_checks.kernels, "quant_linear", off_by_one_bit)
    wrong = [row["name"] for row in gpu_checks.bits("cpu") if not row["right"]]
    assert wrong == ["quant_linear W4A4", "quant_linear W4A8"], "a float product's last bit is within its tolerance"


def test_rows_stop_when_time_is_up(monkeypatch, capsys):
    """And what is wrong, slow or missing is in the rows and in the table."""
    timed = {"name": "layer", "tokens": 1, "way": "W4A8", "seconds": 1e-5, "speedup": 2.0}
    sections = {
        "bits": lambda config: iter([{"name": "a", "right": False}, {"name": "b", "right": True}]),
        "linear": lambda config: iter([timed, {**timed, "way": "torchao", "seconds": None, "speedup": None}, timed]),
    }
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "reference")  # put back afterwards

    class Logger:
        def log(self, **values):
            assert values["name"]

    found = gpu.run(BenchmarkGpuConfig(seconds=100), Logger())
    assert len(found["rows"]) == 5 and found["wrong"] == ["bits a"] and found["unfinished"] == []
    out = capsys.readouterr().out
    assert "WRONG" in out and "2.00x" in out and "fails" in out
    found = gpu.run(BenchmarkGpuConfig(seconds=1e-9), Logger())
    assert [row["name"] for row in found["rows"]] == ["a", "layer"] and found["unfinished"] == ["bits", "linear"]
    assert "not all of bits, linear" in capsys.readouterr().out


def test_the_block_is_one_of_linears():
    """A quantized block is the block of its dequantized weights; the tolerance is that of float32 sums of 64."""
    weights: list = []

    def exact(out, features):
        packed, scale, zero, bits = weights.pop(0)
        weight = dequantize(unpack_bits(packed, bits, features), scale, zero)
        assert weight.shape == (out, features)
        return lambda x: x @ weight.t()

    def quantized(out, features):
        linear = gpu_linears.ours(4, 16, out, features, device="cpu")
        cells = dict(zip(linear.__code__.co_freevars, (c.cell_contents for c in linear.__closure__), strict=True))
        weights.append((cells["packed"], cells["scale"], cells["zero_point"], 4))
        return linear

    x, blocks = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)), []
    for linear in (quantized, exact):
        torch.manual_seed(0)
        made = gpu_block.Block(linear, 3, 32, 64, 4, 8, "cpu", torch.float32)
        torch.manual_seed(1)
        made.keys.normal_(), made.values.normal_()
        blocks.append(made)
    assert not weights
    ours, theirs = (block(x) for block in blocks)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.allclose(blocks[0].keys[:, :, -1], blocks[1].keys[:, :, -1], atol=1e-5), "this step's keys are kept"


def test_every_way_is_named_by_its_bits():
    ways = gpu_linears.ways()
    assert next(iter(ways)) == "bf16"
    for name, bits in gpu_linears.SCHEMES.items():
        assert name == "W{}A{}".format(*bits) and isinstance(ways[name], partial) and ways[name].args == bits


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    code, _, stderr = run_there(*COMMAND, "benchmark", "gpu", "tokens=[1,256]", "seconds=300", f"output_dir={tmp_path}")
    assert code == 0, stderr
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert found["wrong"] == [] and {row["section"] for row in found["rows"]} >= {"bits", "graphs", "nccl", "decode"}
