"""Names and row orders of a GPTModel against loops that are written down again; nothing here needs Megatron."""

from __future__ import annotations

import oracles
import pytest
import torch
from commands import needs_megatron
from torch import Tensor

from megatron_lowbit.adapters.megatron.layout import COLUMN, NORMS, PATHS, Layout, find_prefix, norm_name, parts
from megatron_lowbit.quant.affine import LowRank, QuantizedWeight

# (heads, groups, head_dim, ffn, tp): several groups per rank, one group per rank, one group for all heads, as many
# groups as heads, fewer groups than ranks (a rank then holds part of a group), and a head_dim that is not hidden/heads.
SHAPES = [
    (8, 4, 8, 172, 1),
    (8, 4, 8, 172, 2),
    (8, 4, 16, 172, 4),
    (8, 1, 4, 6, 1),
    (6, 2, 5, 12, 2),
    (4, 4, 3, 20, 4),
    (8, 2, 4, 24, 4),
    (4, 1, 2, 10, 2),
]
HIDDEN, SHARED = 40, 8


def make(heads: int, groups: int, head_dim: int, ffn: int, tp: int) -> Layout:
    return Layout(heads, groups, head_dim, ffn, HIDDEN, tp, SHARED)


@pytest.mark.parametrize("shape", SHAPES)
def test_order_of_fused_rows(shape):
    heads, groups, head_dim, ffn, tp = shape
    layout = make(*shape)
    assert layout.order("linear_qkv").tolist() == oracles.fused_qkv_rows(heads, groups, head_dim)
    assert layout.order("linear_fc1").tolist() == oracles.fused_gate_up_rows(ffn, tp)
    assert layout.order("shared_fc1").tolist() == oracles.fused_gate_up_rows(SHARED, tp)
    for role in ("linear_proj", "linear_fc2", "shared_fc2"):
        assert layout.order(role).tolist() == list(range(HIDDEN))


def test_order_by_hand():
    """Two groups of two heads of one channel: q0 q1 k0 v0, q2 q3 k1 v1; three gates and ups for one rank and for 3."""
    assert make(4, 2, 1, 3, 1).order("linear_qkv").tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert make(4, 2, 1, 3, 1).order("linear_fc1").tolist() == [0, 1, 2, 3, 4, 5]
    assert make(4, 2, 1, 3, 3).order("linear_fc1").tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("role", COLUMN)
def test_ranks_hold_equal_neighbouring_pieces(role, shape):
    layout, tp = make(*shape), shape[-1]
    pieces = [layout.rank_rows(role, rank) for rank in range(tp)]
    assert {len(piece) for piece in pieces} == {sum(layout.part_rows(role)) // tp}
    assert torch.equal(torch.cat(pieces), layout.order(role))
    assert sorted(layout.order(role).tolist()) == list(range(sum(layout.part_rows(role)))), "every row once"


@pytest.mark.parametrize("groups", (2, 4))
def test_a_rank_holds_whole_groups(groups):
    """At tp == groups rank r's rows are the heads, the key and the value of group r, so its attention is its own."""
    layout = make(8, groups, 3, 24, groups)
    for rank in range(groups):
        heads = range(8 * rank // groups, 8 * (rank + 1) // groups)
        blocks = [*heads, 8 + rank, 8 + groups + rank]
        expected = [block * 3 + row for block in blocks for row in range(3)]
        assert layout.rank_rows("linear_qkv", rank).tolist() == expected


def test_sizes():
    layout = make(8, 2, 6, 172, 2)
    assert layout.part_rows("linear_qkv") == (48, 12, 12)
    assert layout.part_rows("linear_fc1") == (172, 172)
    assert layout.part_rows("shared_fc1") == (SHARED, SHARED)
    assert all(layout.part_rows(role) == (HIDDEN,) for role in ("linear_proj", "linear_fc2", "shared_fc2"))
    widths = {role: layout.in_features(role) for role in PATHS}
    wide = {"linear_proj": 48, "linear_fc2": 172, "shared_fc2": SHARED}
    assert widths == dict.fromkeys(("linear_qkv", "linear_fc1", "shared_fc1"), HIDDEN) | wide


def test_parts_are_fused_where_the_model_has_them_fused():
    """Phi-3 fuses in Hugging Face too; what is known decides, role by role and layer by layer."""
    block = "model.layers.3"
    separate = {
        "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "linear_proj": ("self_attn.o_proj",),
        "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
        "linear_fc2": ("mlp.down_proj",),
    }
    fused = separate | {"linear_qkv": ("self_attn.qkv_proj",), "linear_fc1": ("mlp.gate_up_proj",)}
    for table in (separate, fused):
        known = {f"{block}.{leaf}" for leaves in table.values() for leaf in leaves}
        for role, leaves in table.items():
            assert parts("model.layers", 3, role, known) == tuple(f"{block}.{leaf}" for leaf in leaves)
    elsewhere = {f"model.layers.2.{leaf}" for leaf in ("self_attn.qkv_proj", "mlp.gate_up_proj")}
    assert parts("model.layers", 3, "linear_qkv", elsewhere)[0] == f"{block}.self_attn.q_proj"
    assert parts("model.layers", 3, "linear_fc1", ())[1] == f"{block}.mlp.up_proj"


def test_names_of_a_shared_expert():
    """Qwen2-MoE has one; DeepSeek and dots.llm1 may have several, written as one."""
    for name in ("shared_expert", "shared_experts"):
        leaves = {"shared_fc1": ("gate_proj", "up_proj"), "shared_fc2": ("down_proj",)}
        known = {f"m.2.mlp.{name}.{leaf}" for role in leaves for leaf in leaves[role]} | {"m.1.mlp.down_proj"}
        for role, found in leaves.items():
            assert parts("m", 2, role, known) == tuple(f"m.2.mlp.{name}.{leaf}" for leaf in found)
        assert parts("m", 1, "linear_fc2", known) == ("m.1.mlp.down_proj",)
    assert parts("m", 2, "shared_fc2", ()) == ("m.2.mlp.shared_expert.down_proj",)


def test_names_of_norms():
    assert norm_name("m", 1, "input_layernorm") == "m.1.input_layernorm"
    assert norm_name("m", 1, "pre_mlp_layernorm") == "m.1.post_attention_layernorm"
    assert norm_name("m", 1, "self_attention.q_layernorm") == "m.1.self_attn.q_norm"
    assert norm_name("m", 1, "self_attention.k_layernorm") == "m.1.self_attn.k_norm"
    assert [NORMS[norm][1] for norm in ("input_layernorm", "pre_mlp_layernorm")] == ["linear_qkv", "linear_fc1"]


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"], "model.layers"),
        (["model.language_model.layers.11.self_attn.q_proj.weight"], "model.language_model.layers"),
        (["layers.0.input_layernorm.weight"], "layers"),
        (["vision.blocks.0.attn.qkv.weight", "text.layers.0.self_attn.q_proj.weight"], "text.layers"),
        (["model.layers.10.mlp.experts.3.down_proj.weight"], "model.layers"),
        ([], "model.layers"),
    ],
)
def test_find_prefix(names, prefix):
    assert find_prefix(names) == prefix


@pytest.mark.filterwarnings("ignore:.*Apex")
@needs_megatron
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("role", PATHS)
def test_split_rows_undoes_the_fusing(role, shape):
    """All ranks' rows, split into the parts and put together in rank order, are the parts again; so a checksum of a
    part over the ranks is that of Hugging Face's linear."""
    from megatron_lowbit.adapters.megatron.layout import split_rows

    layout, tp = make(*shape), shape[-1]
    sizes = layout.part_rows(role)
    whole = torch.arange(sum(sizes) * 2).view(-1, 2)  # each row has its own values
    fused = whole[layout.order(role)]
    shares = fused.chunk(tp) if role in COLUMN else [fused] * tp  # a row-parallel rank has all rows
    pieces = [split_rows(share, layout, role, rank) for rank, share in enumerate(shares)]
    if role not in COLUMN:
        assert all(len(rank) == 1 and torch.equal(rank[0], whole) for rank in pieces)
        return
    for number, part in enumerate(whole.split(sizes)):
        assert torch.equal(torch.cat([rank[number] for rank in pieces]), part)


@needs_megatron
def test_branches_of_other_ranks_are_fused():
    """Whole numbers, exact in bf16: the product of the fused factors is that of each part's own, rows in any order."""
    from megatron_lowbit.adapters.megatron.replacements import fused_branch

    numbers = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=numbers).to(torch.bfloat16)

    weights = [QuantizedWeight.from_float(whole(outputs, 12).float(), 4) for outputs in (8, 4, 4)]
    branches = [LowRank(whole(2, 12), whole(8, 2)), LowRank(whole(5, 12), whole(4, 5)), None]
    rows = torch.tensor([15, 0, 9, 3, 8, 12])
    fused = fused_branch(branches, weights, 5, rows)
    assert fused is not None and fused.lora_a.shape == (15, 12) and fused.lora_b.shape == (6, 15)
    products = [b.lora_b.double() @ b.lora_a.double() for b in branches if b is not None]
    expected = torch.cat([*products, torch.zeros(4, 12).double()])[rows]
    assert torch.equal(fused.lora_b.double() @ fused.lora_a.double(), expected)
    assert fused_branch([None] * 3, weights, None, rows) is None
