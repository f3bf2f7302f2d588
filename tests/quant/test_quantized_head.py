"""A quantized output projection by itself: rows that are looked up, its KL divergence, and its files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megatron_lowbit.config import LowBitError, QuantizeConfig, WeightsConfig
from megatron_lowbit.io.files import read_meta, write_sealed
from megatron_lowbit.layers.head import QuantEmbedding, QuantHead
from megatron_lowbit.qllm.resume import RunState
from megatron_lowbit.quant import head as heads
from megatron_lowbit.quant.affine import QuantizedWeight, Scheme
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.head import QuantizedHead, attach_head, make_head

LINEAR = "model.layers.0.mlp.down_proj"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_by_hand(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, step and zero point of each row in float64: round to nearest, written down again."""
    low, high = weight.double().amin(1, keepdim=True), weight.double().amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    zero = (-low / step).round()
    return ((weight.double() / step).round() + zero).clip(0, 2**bits - 1), step, zero


def make_checkpoint(embedding: str | None = None) -> LowBitCheckpoint:
    """One linear, one other tensor, and a head that nothing was measured of."""
    tensors = {"model.norm.weight": normal(8), "lm_head.weight": normal(12, 8), "model.embed.weight": normal(12, 8)}
    linears = {LINEAR: QuantizedWeight.from_float(normal(8, 8), 4)}
    fingerprint = {"hidden_size": 8, "weights": {LINEAR: 5}}
    plain = LowBitCheckpoint(linears, tensors, Scheme.parse("W4A8"), "W4A8", 4, fingerprint)
    weight = QuantizedWeight.from_float(tensors["lm_head.weight"], 6)
    return attach_head(plain, QuantizedHead(weight, "lm_head", embedding, 1e-4, 100), -7)


@pytest.mark.parametrize("outputs, inputs", [(128, 64), (130, 70), (1, 1), (65, 33)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_are_those_of_the_codes(bits, outputs, inputs):
    """Before and after the linear has put its weight in the kernels' order; the rows of a constant are exact."""
    weight = normal(outputs, inputs)
    weight[-1] = 0.25
    head = QuantHead(QuantizedWeight.from_float(weight, bits))
    ids = torch.tensor([[0, outputs - 1, outputs // 2], [outputs - 1, 0, outputs // 3]])
    codes, step, zero = codes_by_hand(weight, bits)
    expected = torch.where(step == 0, weight.double(), step * (codes - zero))[ids]
    first = head.lookup(ids)
    head(normal(2, inputs))
    again = head.lookup(ids)
    # The scale is float32, its product with a whole number is rounded once more: 2^-24 each, and of the range where
    # the row's own zero is far off.
    torch.testing.assert_close(first.double(), expected, rtol=2.0**-22, atol=0)
    assert torch.equal(first, again)


def test_the_codes_are_in_memory_once_and_stay_in_the_kernels_order():
    head = QuantHead(QuantizedWeight.from_float(normal(100, 64), 8))
    embedding = QuantEmbedding(head, torch.bfloat16)
    head(normal(3, 64))
    if head._panels is None:
        pytest.skip("the C++ kernels are not built here")
    panels = head._panels.data_ptr()
    for _ in range(2):
        assert embedding(torch.tensor([3, 99])).dtype == torch.bfloat16
        head(normal(3, 64))
    assert head._panels.data_ptr() == panels and "packed_weight" not in head._buffers
    assert not list(embedding.parameters()) and embedding.state_dict() == {}
    assert sum(buffer.numel() for buffer in embedding.buffers()) == 0


@pytest.mark.parametrize("bad", [-1, 100])
@pytest.mark.parametrize("ordered", [False, True])
def test_an_id_without_a_row_is_an_error(bad, ordered):
    head = QuantHead(QuantizedWeight.from_float(normal(100, 64), 8))
    if ordered:
        head(normal(1, 64))
    with pytest.raises(IndexError):
        head.lookup(torch.tensor([3, bad]))


class Capped(nn.Module):
    """A model that is its output projection, with a bias and a soft cap."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(16, 40)
        self.lm_head.weight.data = normal(40, 16)
        self.lm_head.bias.data = normal(40, seed=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return 5 * torch.tanh(self.lm_head(hidden) / 5)


def texts() -> list[tuple[Tensor, Tensor]]:
    """Three windows of 70 tokens, more than are computed at once; the last ends in padding."""
    windows = [(normal(1, 70, 16, seed=seed), torch.ones(1, 70, dtype=torch.bool)) for seed in range(3)]
    windows[-1][1][0, 50:] = False
    return windows


def made(bits: int, model: Capped | None = None) -> QuantizedHead:
    model = model or Capped()
    weight, bias = model.lm_head.weight.detach(), model.lm_head.bias.detach()
    return make_head("lm_head", None, model.lm_head, weight, bias, bits, texts(), model)


def test_the_kl_divergence_is_that_of_float64():
    model, total, tokens = Capped(), 0.0, 0
    codes, step, zero = codes_by_hand(model.lm_head.weight.detach(), 6)
    bias = model.lm_head.bias.detach().double()
    for hidden, mask in texts():
        weights = model.lm_head.weight.detach().double(), step * (codes - zero)
        full, rounded = (5 * torch.tanh((hidden[0].double() @ w.T + bias) / 5) for w in weights)
        p, q = full.softmax(-1), rounded.softmax(-1)
        total += (p * (p / q).log()).sum(-1)[mask[0]].sum().item()
        tokens += int(mask.sum())
    head = made(6)
    assert head.tokens == tokens == 190
    # A float32 logit is off by some 1e-6; the KL is half the variance of differences of 1e-2, so off by 1e-4 of itself.
    assert head.kl == pytest.approx(total / tokens, rel=1e-3)
    assert 1e-5 < head.kl < heads.KL_LIMIT


def test_too_few_bits_are_refused():
    with pytest.raises(LowBitError) as caught:
        made(2)
    message = str(caught.value)
    assert message.startswith("weights.lm_head_bits=2 costs a KL divergence of ")
    assert message.endswith("nats per token, above the limit of 0.01; raise it to 8, or leave it out")


def test_at_8_bits_the_fix_is_another(monkeypatch):
    monkeypatch.setattr(heads, "KL_LIMIT", 1e-9)
    with pytest.raises(LowBitError, match="above the limit of 1e-09; leave it out"):
        made(8)


def test_nan_is_refused():
    model = Capped()
    model.lm_head.weight.data[3, 4] = float("nan")
    with pytest.raises(LowBitError, match=r"lm_head\.weight holds NaN or Inf"):
        made(8, model)


def test_a_model_that_goes_around_its_projection_is_refused():
    model = Capped()
    model.forward = lambda hidden: hidden @ model.lm_head.weight.T  # type: ignore[method-assign]
    with pytest.raises(LowBitError, match="does not compute its logits with its output projection alone"):
        made(8, model)


@pytest.mark.parametrize("embedding", [None, "model.embed"])
def test_the_artifact_round_trip(tmp_path, embedding):
    checkpoint = make_checkpoint(embedding)
    checkpoint.save(tmp_path)
    loaded = LowBitCheckpoint.load(tmp_path)
    assert loaded.head is not None and checkpoint.head is not None
    for leaf in ("packed_weight", "scale", "zero_point"):
        assert torch.equal(getattr(loaded.head.weight, leaf), getattr(checkpoint.head.weight, leaf))
    assert loaded.head.describe() == checkpoint.head.describe()
    assert set(loaded.tensors) == {"model.norm.weight"} | ({"model.embed.weight"} if embedding is None else set())
    # 12 rows of 8 codes of 6 bits, and a scale and a zero point each
    assert loaded.head.nbytes == 12 * (6 + 8)
    assert loaded.nbytes() == checkpoint.nbytes()
    assert loaded.fingerprint["weights"] == {LINEAR: 5, "lm_head": -7}


def test_an_earlier_version_refuses_it(tmp_path):
    """Earlier versions read format 4 and 3, as plans still do."""
    make_checkpoint().save(tmp_path)
    with pytest.raises(LowBitError, match="has format 5; this version reads 4 and 3"):
        read_meta(tmp_path / "lowbit")


def test_an_artifact_without_one_is_as_it_was(tmp_path):
    checkpoint = make_checkpoint()
    replace(checkpoint, head=None, fingerprint={"weights": {LINEAR: 5}}).save(tmp_path)
    meta = json.loads((tmp_path / "lowbit.json").read_text())
    assert meta["format"] == 4
    assert set(meta) == {
        *("format", "fingerprint", "scheme", "shard_groups", "attention_bits", "files", "in_features", "reassembly"),
        *("low_rank", "beside", "json_sha256"),
    }


def test_an_unfinished_run_does_not_depend_on_it(tmp_path):
    """The names of its parts and its settings are those of earlier versions, and it goes on with other bits."""
    states = [
        RunState(QuantizeConfig(output_dir=str(tmp_path), weights=WeightsConfig(lm_head_bits=bits)), {})
        for bits in (0, 8)
    ]
    assert "weights.lm_head_bits" not in states[0].settings
    assert states[0].settings == states[1].settings and states[0].run_name == states[1].run_name


def damaged(**changes: object):
    return lambda meta: meta["head"].update(changes)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda meta: meta.pop("head"), "lacks head"),
        (lambda meta: meta.update(format=4), "the tensor lm_head.packed_weight belongs to nothing"),
        (damaged(bits=9), "head.bits"),
        (damaged(bits=4), "lm_head.packed_weight is uint8"),
        (damaged(in_features=20), "lm_head.packed_weight is uint8"),
        (damaged(name="other"), "lacks other.packed_weight"),
        (damaged(kl="small"), "head.kl"),
        (damaged(tokens=0), "head.tokens"),
        (lambda meta: meta["fingerprint"]["weights"].pop("lm_head"), "its fingerprint lacks the linear lm_head"),
        (damaged(embedding="model.norm"), "the tensor model.norm.weight belongs to nothing"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, damage, said):
    make_checkpoint().save(tmp_path)
    path = tmp_path / "lowbit.json"
    meta = json.loads(path.read_text())
    meta.pop("json_sha256")
    damage(meta)
    write_sealed(path, meta)
    with pytest.raises(LowBitError, match=said) as caught:
        LowBitCheckpoint.load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_one_bit_is_no_setting():
    with pytest.raises(LowBitError, match="lm_head_bits=1: it is 0"):
        WeightsConfig(lm_head_bits=1)
