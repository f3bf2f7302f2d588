"""weights.experts: against the dequantized weights, in whole runs, on several ranks, and what is refused."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import deepspeed_cases
import family_matrix
import family_models
import pytest
import tiny_models
import torch
from commands import CALIBRATION_TEXT, needs_deepspeed, run_here
from quantize_runs import checksums, quantize
from torch import Tensor
from torch.nn import functional as F

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.huggingface.apply import find_linears
from megatron_lowbit.adapters.huggingface.experts import expert_modules, find_experts, projections
from megatron_lowbit.config import EvaluateConfig, LowBitError, WeightsConfig
from megatron_lowbit.io.data import token_windows
from megatron_lowbit.io.files import write_sealed
from megatron_lowbit.launch.loading import load_model, read_config, read_tokenizer
from megatron_lowbit.qllm.input_sums import gram
from megatron_lowbit.qllm.rotate_model import rotate_model
from megatron_lowbit.quant.affine import fake_quantize
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.experts import round_expert
from megatron_lowbit.quant.gptq import InverseFactor

# Plain; gate and up in one another's rows, biases, [in, out]; no gate; dense blocks and shared experts beside them.
FAMILIES = ("mixtral", "gpt_oss", "nemotron_h", "qwen2_moe", "deepseek_v3")
TEXT = [f"calibration.data={CALIBRATION_TEXT}", "calibration.samples=4", "calibration.sequence_length=64"]
UNTRAINED = ["weights.method=qllm", "correction.mode=none", "reassembly.mode=none", *TEXT, "comm.tp_sizes=[]"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            changes = {"num_experts": 4} if family == "qwen3_moe" else {}
            made[family] = family_models.save(family, tmp_path_factory.mktemp(family), **changes)
        return made[family]

    return folder


@pytest.fixture(scope="module")
def artifacts(folders, tmp_path_factory):
    made: dict[tuple[str, ...], Path] = {}

    def artifact(family: str, *settings: str) -> Path:
        if (family, *settings) not in made:
            model = f"model={folders(family)}"
            made[family, *settings] = quantize(tmp_path_factory.mktemp(family) / "artifact", model, *settings)
        return made[family, *settings]

    return artifact


RTN = ("weights.method=rtn", "weights.scheme=W4A16", "weights.experts=W4A16")


def whole(folder: Path) -> Any:
    return load_model(EvaluateConfig(model=str(folder), dtype="float32"), read_config(folder), None).eval()


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    ids = torch.randint(3, 1000, (2, 24), generator=torch.Generator().manual_seed(0)) if ids is None else ids
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def dequantized(model: Any, checkpoint: LowBitCheckpoint) -> Any:
    """The model with the weights that the codes stand for, computed by transformers' own code."""
    twin = copy.deepcopy(model)
    for name, (_, linear) in find_linears(twin).items():
        linear.weight.data.copy_(checkpoint.linears[name].dequantize())
    assert checkpoint.experts is not None
    for name, module in find_experts(twin).items():
        for leaf in projections(module):
            tensor = getattr(module, leaf).data
            experts = checkpoint.experts.weights[f"{name}.{leaf}"].dequantize().chunk(len(tensor))
            for own, codes in zip(tensor, experts, strict=True):
                own.copy_(codes.T if module.is_transposed else codes)
    return twin


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_codes_are_the_model_of_their_dequantized_weights(family, folders, artifacts):
    model, checkpoint = whole(folders(family)), LowBitCheckpoint.load(artifacts(family, *RTN))
    expected, before = logits(dequantized(model, checkpoint)), logits(model)
    found = logits(lowbit.apply_to_huggingface(model, artifacts(family, *RTN)))
    # float32 sums in another order, over two blocks; the rounding itself moves logits by thousands of times as much.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (expected - before).abs().max() > 1e-2 * before.abs().max()
    lowbit.remove(model)
    assert torch.equal(logits(model), before)


def test_the_artifact_alone_is_the_same_model(folders, artifacts):
    folder = artifacts("mixtral", *RTN)
    alone = load_model(
        EvaluateConfig(artifact=str(folder), dtype="float32"), read_config(folder), LowBitCheckpoint.load(folder)
    )
    found = logits(lowbit.apply_to_huggingface(alone, folder))
    assert torch.equal(found, logits(lowbit.apply_to_huggingface(whole(folders("mixtral")), folder)))


def test_inputs_are_quantized_token_by_token(folders, artifacts):
    """W8A8 against float64, expert by expert; and a token's result does not depend on its neighbours."""
    folder = artifacts("mixtral", "weights.method=rtn", "weights.scheme=W8A8", "weights.experts=W8A8")
    checkpoint, model = LowBitCheckpoint.load(folder), whole(folders("mixtral"))
    name, module = next(iter(expert_modules(model, checkpoint.experts).items()))
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(9, 64, generator=draw)
    index = torch.stack([torch.randperm(4, generator=draw)[:2] for _ in x])
    share = torch.rand(9, 2, generator=draw)
    up, down = (
        checkpoint.experts.weights[f"{name}.{leaf}"].dequantize().double().chunk(4)
        for leaf in ("gate_up_proj", "down_proj")
    )
    expected = torch.zeros(9, 64, dtype=torch.float64)
    for t in range(9):
        for k in range(2):
            e = int(index[t, k])
            gate, value = (up[e] @ fake_quantize(x[t : t + 1], 8)[0].double()).chunk(2)
            inner = (F.silu(gate) * value).float()[None]
            expected[t] += share[t, k].double() * (down[e] @ fake_quantize(inner, 8)[0].double())
    found = module(x, index, share)
    # An inner value may lie within a float32 ulp of the middle between two codes, one step of 1/255 of its range.
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    assert torch.equal(module(x[3:5], index[3:5], share[3:5]), found[3:5])
    assert module(x[:0], index[:0], share[:0]).shape == (0, 64)


GPTQ = ("weights.scheme=W4A16", "weights.experts=W4A16", "weights.rounding=gptq", "weights.clipping=mse", *UNTRAINED)


def test_each_expert_is_rounded_for_its_own_tokens(folders, artifacts):
    """The codes are those that GPTQ chooses for the tokens that the quantized model sends to an expert, alone."""
    folder, model = artifacts("mixtral", *GPTQ), whole(folders("mixtral"))
    name, module = next(iter(find_experts(model).items()))
    weights, sent = module.gate_up_proj.detach().clone(), {}
    lowbit.apply_to_huggingface(model, folder)
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: sent.update(x=args[0], index=args[1]))
    ids = token_windows(read_tokenizer(folders("mixtral")), CALIBRATION_TEXT, 4, 64, 128, "calibration").ids
    logits(model, ids)
    config = WeightsConfig(scheme="W4A16", experts="W4A16", rounding="gptq", clipping="mse")
    experts = LowBitCheckpoint.load(folder).experts.weights[f"{name}.gate_up_proj"].codes().chunk(4)
    for expert, codes in enumerate(experts):
        same = []
        for tokens in (sent["x"][(sent["index"] == expert).any(1)], sent["x"]):
            hessian = gram(tokens)
            found = round_expert(weights[expert], config, "", hessian.diagonal(), InverseFactor.of(hessian)).codes()
            same.append(float((found == codes).double().mean()))
        # Attention's float32 sums are in another order here: a value on the middle between two codes may move.
        assert same[0] > 0.99 and same[1] < 0.95, f"expert {expert}: {same}"


def test_a_rotated_model_computes_what_it_did(folders):
    model = whole(folders("mixtral"))
    before = logits(model)
    online = rotate_model(model, seed=0, shard_groups=2, attention_bits=16)
    assert not online.residual and not online.inputs, "experts and routers read the residual stream"
    assert not torch.equal(logits(model), before), "V and the output projection are rotated"
    # float32 sums in another order, over two blocks.
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@needs_deepspeed
def test_deepspeed_runs_them_on_every_rank(two_ranks, folders, artifacts):
    folder = artifacts("mixtral", *RTN)
    expected = tiny_models.logits(lowbit.apply_to_huggingface(whole(folders("mixtral")), folder, 2, "native"))
    for found in two_ranks.run(deepspeed_cases.experts, folders("mixtral"), folder):
        assert found["experts"] == 2 and found["removed"]
        # The two ranks' float32 partial sums are added up in another order.
        torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("ranks", ["tp=2", "dp=2"])
def test_the_same_codes_on_several_ranks(ranks, folders, artifacts, tmp_path):
    settings = (f"model={folders('mixtral')}", *GPTQ, ranks)
    assert checksums(quantize(tmp_path / "ranks", *settings)) == checksums(artifacts("mixtral", *GPTQ))


def test_correction_trains_through_the_experts(folders, tmp_path):
    """A corrected run ends, with experts in 8 bits, and evaluates."""
    training = ["correction.epochs=1", "correction.batch_size=2", "correction.rank=2", "comm.tp_sizes=[2]"]
    settings = ("weights.scheme=W4A8", "weights.experts=W8A8", *TEXT, *training)
    folder = quantize(tmp_path / "artifact", f"model={folders('mixtral')}", *settings)
    assert LowBitCheckpoint.load(folder).experts.scheme == "W8A8"
    assert (
        run_here("evaluate", f"artifact={folder}", "virtual_tp=2", *family_matrix.LOOK, f"output_dir={tmp_path}") == 0
    )


def test_the_router_stays_as_it_is(folders, artifacts):
    checkpoint, model = LowBitCheckpoint.load(artifacts("mixtral", *RTN)), whole(folders("mixtral"))
    gates = [name for name in checkpoint.tensors if name.endswith("mlp.gate.weight")]
    assert len(gates) == 2 and all(torch.equal(checkpoint.tensors[n], model.get_parameter(n)) for n in gates)
    experts = sum(p.numel() for m in find_experts(model).values() for p in m.parameters())
    sizes = checkpoint.experts.nbytes
    # Half a byte each, and two float32 per row: 192 rows of 64 inputs, 64 rows of 96, in four experts of two blocks.
    assert sizes == experts / 2 + 8 * (192 + 64) * 4 * 2


def test_a_model_without_experts_is_refused(folders, tmp_path, capsys):
    for method in (["weights.method=rtn"], UNTRAINED):
        argv = [f"model={folders('llama')}", "weights.scheme=W4A16", "weights.experts=W4A16", *method]
        assert run_here("quantize", *argv, f"output_dir={tmp_path / 'out'}") == 2
        assert "weights.experts=W4A16 has no effect on LlamaForCausalLM" in capsys.readouterr().err
        assert not (tmp_path / "out" / "lowbit.json").exists()


def test_experts_of_another_model_are_refused(folders, artifacts, tmp_path):
    model = family_models.build("mixtral")
    next(iter(find_experts(model).values())).down_proj.data[1, 2, 3] += 0.5
    with pytest.raises(LowBitError, match="other values in 1 of"):
        lowbit.apply_to_huggingface(model, artifacts("mixtral", *RTN))
    with pytest.raises(LowBitError, match="belongs to another model"):
        lowbit.apply_to_huggingface(family_models.build("mixtral", num_local_experts=2), artifacts("mixtral", *RTN))


@pytest.mark.parametrize("damage", ["bits", "missing", "format"])
def test_a_damaged_description_is_refused(damage, artifacts, tmp_path):
    folder = tmp_path / "artifact"
    shutil.copytree(artifacts("mixtral", *RTN), folder)
    meta = json.loads((folder / "lowbit.json").read_text())
    if damage == "bits":
        meta["experts"]["scheme"] = "W8A16"
    elif damage == "missing":
        meta["experts"]["in_features"]["model.layers.7.mlp.experts.down_proj"] = 96
    else:
        meta["format"] = 4
    meta.pop("json_sha256")
    write_sealed(folder / "lowbit.json", meta)
    with pytest.raises(LowBitError):
        LowBitCheckpoint.load(folder)
