"""Tensor-parallel sizes that a model can have, and the shard groups that serve them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megatron_lowbit.layers.linear import activation_groups
from megatron_lowbit.quant.tp_sizes import default_shard_groups, default_tp_sizes, groups_for

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def chosen(heads: int, kv_heads: int, inner: int, head_dim: int) -> tuple[tuple[int, ...], int]:
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=inner)
    return default_tp_sizes(config), default_shard_groups(config, {heads * head_dim, kv_heads * head_dim, inner})


@pytest.mark.parametrize(
    ("model", "sizes", "groups"),
    [
        ((9, 3, 1536, 64), (3,), 6),  # SmolLM2-135M: 9 groups would be nearer to 8, but do not divide 1536
        ((32, 32, 11008, 128), (2, 4, 8), 8),  # Llama-2-7B
        ((64, 8, 28672, 128), (2, 4, 8), 8),  # Llama-2-70B
        ((8, 1, 16384, 256), (2, 4, 8), 8),  # Gemma-2B: Megatron's ranks share the one KV head
        ((52, 52, 17920, 128), (2, 4), 8),  # Llama-30B
        ((14, 2, 4864, 64), (2,), 8),  # Qwen2.5-0.5B: 7 does not divide the MLP
        ((12, 12, 3072, 64), (2, 3, 4, 6), 12),
        ((24, 24, 6144, 64), (2, 4, 8), 8),  # 3 and 6 would need 24 groups
        ((25, 25, 6400, 64), (5,), 10),  # GPT-2 XL's heads
        ((7, 7, 1000, 64), (), 8),
    ],
)
def test_models(model, sizes, groups):
    assert chosen(*model) == (sizes, groups)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_what_was_the_default_stays_so_for_every_config(config):
    """8 shard groups and ranges for 2, 4 and 8 ranks, where they are possible."""
    of = (yaml.safe_load(config.read_text()) or {}).get("architecture")
    if of is None:
        pytest.skip("the embedded model's")
    widths = {of["hidden_size"], of["intermediate_size"]}
    assert default_shard_groups(SimpleNamespace(**of), widths) == 8
    heads = of["num_attention_heads"]
    assert default_tp_sizes(SimpleNamespace(**of)) == tuple(size for size in (2, 4, 8) if heads % size == 0)


def test_every_size_is_served_and_possible():
    for heads in range(1, 65):
        for kv_heads in {1, heads, heads // 3 or 1}:
            sizes, groups = chosen(heads, kv_heads, 2880, 64)
            assert all(groups % size == 0 and heads % size == 0 and 2880 % size == 0 for size in sizes)
            assert all(kv_heads % size == 0 or size % kv_heads == 0 for size in sizes)
            assert groups <= 16 and (groups == 8 or all(width % groups == 0 for width in (heads * 64, 2880)))


def test_a_config_without_heads_gets_what_was_the_default():
    assert default_shard_groups(SimpleNamespace(), {64}) == 8
    assert default_shard_groups(None, {64}) == 8
    assert default_tp_sizes(None) == (2, 4, 8)


@pytest.mark.parametrize(
    ("size", "widths", "groups"), [(3, {576, 1536}, 6), (2, {64}, 8), (32, {64, 96}, 32), (3, {64}, 3)]
)
def test_a_number_of_groups_that_an_error_names(size, widths, groups):
    assert groups_for(size, widths) == groups


def test_ranks_that_divide_width_and_groups_divide_what_a_width_gets():
    for groups in (1, 3, 6, 8, 12):
        for width in range(1, 200):
            own = activation_groups(width, groups)
            assert width % own == 0 and groups % own == 0
            for size in range(1, 13):
                assert (own % size == 0) == (width % size == 0 and groups % size == 0)
