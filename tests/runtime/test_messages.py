"""What ranks tell each other comes back as it was, runs no code, and is nothing else than plain values."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import rank_cases
import torch

from megatron_lowbit.io.messages import decode, encode

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "value",
    [None, True, -3, 2**70, 0.1, "", "a\n\0é☃", [], {}, [1, [None, {"a": [2.5]}]], {"tensor": "0", "dict": {"x": 1}}],
    ids=repr,
)
def test_plain_values(value):
    assert decode(encode(value)) == value


def test_floats_keep_their_bits():
    values = decode(encode([math.inf, -math.inf, math.nan, -0.0, 5e-324]))
    assert values[0] == math.inf and values[1] == -math.inf and math.isnan(values[2])
    assert math.copysign(1, values[3]) == -1 and values[4] == 5e-324


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
)
def test_tensors(dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    value = {"a": [tensor, tensor.t(), tensor[:0]], "b": {"c": tensor[1, 2]}}
    found = decode(encode(value))
    for ours, theirs in zip([*value["a"], value["b"]["c"]], [*found["a"], found["b"]["c"]], strict=True):
        assert theirs.dtype == dtype and theirs.shape == ours.shape and torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [object(), {1: 2}, b"x", Path("x"), {"a": {1, 2}}], ids=lambda v: type(v).__name__)
def test_what_is_not_plain(value):
    with pytest.raises(TypeError, match="plain values and tensors"):
        encode(value)


def test_nothing_of_the_product_unpickles():
    """torch.load, pickle, and the collectives of torch.distributed that take any object."""
    banned = {"load": "torch", "all_gather_object": "", "gather_object": "", "broadcast_object_list": ""}
    banned |= {"scatter_object_list": "", "send_object_list": "", "recv_object_list": ""}
    for folder in ("megatron_lowbit", "kernels", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
                assert not {"pickle", "dill", "cloudpickle", "shelve", "marshal"} & set(names), file
                if isinstance(node, ast.Attribute) and node.attr in banned:
                    owner = getattr(node.value, "id", "")
                    assert banned[node.attr] and owner != banned[node.attr], f"{file.name}:{node.lineno}"


def test_between_ranks(two_ranks):
    expected = [(0, 0, [0, 2], 0), (1, 7, [1, 2], 2)]
    assert two_ranks.run(rank_cases.messages) == [(expected, [0, 1], {"of": 0}), (expected, None, {"of": 0})]
