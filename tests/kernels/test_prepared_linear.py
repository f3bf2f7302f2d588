"""PreparedLinear: the products of a linear on a CPU without torch's dispatcher, beside the ops themselves."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import assert_same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lowbit.kernels import cpu_linear, panels
from megatron_lowbit.layers.linear import QuantLinear
from megatron_lowbit.layers.reassembled_norm import Reassembly
from megatron_lowbit.quant.affine import QuantizedWeight
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan

pytestmark = pytest.mark.skipif(panels.linear_kernels.find() is None, reason="no C++ compiler is installed")


def prepared_linear(act_bits: int = 8, act_groups: int = 1, rotated: bool = False, bias: bool = False) -> QuantLinear:
    random = torch.Generator().manual_seed(6)
    weight = QuantizedWeight.from_float(torch.randn(70, 128, generator=random), 4)
    added = torch.randn(70, generator=random).bfloat16() if bias else None
    linear = QuantLinear(weight, added, act_bits, act_groups, rotated=rotated)
    linear(torch.zeros(1, 128, dtype=torch.bfloat16))
    return linear


class SeenOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def through_the_op(linear: QuantLinear, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What the linear computes where a mode of torch's dispatcher sees every op."""
    with SeenOps() as seen:
        y = linear(x, dtype)
    assert [name for name in seen.names if "_linear" in name]
    return y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act_bits, act_groups, rotated", [(8, 1, False), (4, 8, True), (16, 1, False), (16, 2, True)])
def test_prepared_products_are_the_ops(act_bits, act_groups, rotated, bias):
    linear = prepared_linear(act_bits, act_groups, rotated, bias)
    random = torch.Generator().manual_seed(7)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = torch.randn(2, 3, 256, generator=random).to(dtype)
        for rows in (x[..., :128].contiguous(), x[..., ::2], x[:0, :, 128:], x[0, 0, 128:]):
            assert_same_bits(linear(rows), through_the_op(linear, rows))
        takes = dtype != torch.float64 and not (act_bits == 16 and rotated)
        assert linear._prepared is not None and (linear._prepared(x[0, 0, :128], dtype) is not None) == takes
        if dtype == torch.bfloat16:
            rows = x[..., :128].contiguous()
            assert_same_bits(linear(rows, torch.float32), through_the_op(linear, rows, torch.float32))


def test_who_sees_the_op(monkeypatch):
    """Autograd, torch.func, the profiler, modes of the dispatcher and other kernels do; nobody else takes part."""
    linear, x, multiply, calls = prepared_linear(), torch.ones(2, 128, dtype=torch.bfloat16), cpu_linear._multiply, []
    monkeypatch.setattr(cpu_linear, "_multiply", lambda *arguments: calls.append(1) or multiply(*arguments))
    y = linear(x)
    with torch.inference_mode():
        linear(x)
    with torch.no_grad():
        linear(x.clone().requires_grad_())
    assert not calls
    others = (
        lambda: through_the_op(linear, x),
        lambda: linear(x.clone().requires_grad_()).detach(),
        lambda: torch.func.vmap(linear)(x[:, None])[:, 0],
        lambda: linear(x[:1].expand(2, 128)),
    )
    for count, other in enumerate(others, 1):
        assert torch.equal(other(), y) and len(calls) >= count
    calls.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear(x)
    assert calls and any("quant_linear" in event.key for event in profile.key_averages())
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "reference")
    calls.clear()
    assert torch.equal(linear(x), y) and calls


def test_prepared_products_follow_what_is_changed():
    """Scales that are replaced, a rotation and a reassembly that are set later, another state dict, another dtype."""
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(8)).bfloat16()
    linear = prepared_linear()
    before = linear(x)
    linear.scale = linear.scale * 2
    assert_same_bits(linear(x), through_the_op(linear, x))
    assert not torch.equal(linear(x), before)
    linear = prepared_linear()
    linear.scale.mul_(2)
    assert torch.equal(linear(x), 2 * before)
    linear.rotated = True
    assert_same_bits(linear(x), through_the_op(linear, x))
    linear = prepared_linear()
    index = torch.arange(128)
    linear.reassembly = Reassembly(ReassemblyPlan(index, index, torch.arange(128.0), 128, 128))
    assert_same_bits(linear(x), through_the_op(linear, x))
    linear = prepared_linear()
    state = {name: t + 1 if name == "zero_point" else t for name, t in linear.state_dict().items()}
    linear.load_state_dict(state)
    linear(x)
    assert linear._prepared is not None and not torch.equal(linear(x), before)
    assert_same_bits(linear(x), through_the_op(linear, x))
    assert linear.double()._prepared is not None


def test_a_compiled_linear_keeps_the_op():
    linear, x, graphs = prepared_linear(), torch.ones(2, 128, dtype=torch.bfloat16), []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    y = linear(x)
    assert torch.equal(torch.compile(linear, backend=backend, fullgraph=True)(x), y)
    assert "megatron_lowbit.quant_linear" in graphs[0].code
