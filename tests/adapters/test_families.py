"""Model families of transformers: names in the file and in the model, blocks run one by one, and what is refused.

The quick tests take a few families that differ in kind; the slow one takes every family (family_matrix.py).
"""

import json
import shutil
from pathlib import Path

import family_matrix
import family_models
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_lowbit.adapters.huggingface.skeleton import skeleton
from megatron_lowbit.comm.observers import as_windows, window_statistics
from megatron_lowbit.config import LowBitError, QuantizeConfig, WeightsConfig
from megatron_lowbit.io.hf_names import ModelWeights
from megatron_lowbit.launch import main
from megatron_lowbit.launch.loading import read_config
from megatron_lowbit.qllm.block_source import BlockSource
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

# Renamed head; experts that are stacked; a buffer that is stored; positional arguments, tuples, a batch in the mask.
QUICK = ("opt", "mixtral", "gpt_neox", "deepseek_v3", "bloom")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = family_models.save(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


def source_of(folder: Path) -> BlockSource:
    config = QuantizeConfig(model=str(folder), weights=WeightsConfig(scheme="W4A4", method="qllm"))
    return BlockSource(folder, read_config(folder), config, torch.float32, torch.device("cpu"), None)


def rtn(folder: Path, output: Path) -> LowBitCheckpoint:
    argv = ["quantize", f"model={folder}", "weights.method=rtn", "weights.scheme=W4A4", f"output_dir={output}"]
    assert main(argv) == 0
    return LowBitCheckpoint.load(output)


@pytest.mark.parametrize("family", QUICK)
def test_every_stage_runs(family, tmp_path):
    assert set(family_matrix.outcome(family, tmp_path).stages.values()) == {"yes"}


@pytest.mark.parametrize("family", ["mixtral", "gpt_neox", "deepseek_v3", "qwen2_moe", "phimoe", "granitemoe"])
def test_weights_are_read_as_transformers_loads_them(family, folders):
    whole = AutoModelForCausalLM.from_pretrained(folders(family), dtype=torch.float32)
    weights = ModelWeights(folders(family), skeleton(whole.config, torch.float32))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(weights.read(name, tensor.shape), tensor), name
    assert weights.unknown == []


@pytest.mark.parametrize("family", [*QUICK, "gptj", "gemma3_text", "falcon_h1", "starcoder2"])
@torch.no_grad()
def test_blocks_one_by_one_are_the_model(family, folders):
    """The hidden states after all blocks, loaded and run one after the other, are those inside the whole model."""
    source, ids = source_of(folders(family)), torch.randint(3, 1000, (3, 16))
    source.trace(ids)
    hidden, calls = source.embed(ids)
    for index, call in enumerate(calls):
        hidden = call.run(source.block(index), hidden)
    whole = AutoModelForCausalLM.from_pretrained(folders(family), dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    last = whole.get_submodule(f"{source.prefix}.{len(source.blocks) - 1}")
    last.register_forward_hook(lambda module, args, output: seen.append(output[0] if type(output) is tuple else output))
    whole.base_model(input_ids=ids, use_cache=False)
    # The linears are the same matrix products, cut into shards: float32 sums in another order, over some ten layers.
    torch.testing.assert_close(hidden, seen[0], rtol=1e-4, atol=1e-4 * float(seen[0].abs().max()))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "language_model.", "module._orig_mod.", "-model."])
def test_prefixes_of_all_names_are_taken_off(prefix, folders, tmp_path, capsys):
    """Names as torch.compile, a wrapper or a base model saves them; "-model.": without transformers' own prefix."""
    plain = folders("llama")
    shutil.copytree(plain, tmp_path / "model")
    tensors = load_file(plain / "model.safetensors")
    if prefix.startswith("-"):
        renamed = {name.removeprefix(prefix[1:]): tensor for name, tensor in tensors.items()}
    else:
        renamed = {prefix + name: tensor for name, tensor in tensors.items()}
    assert renamed.keys().isdisjoint(name for name in tensors if name != "lm_head.weight" or prefix[0] != "-")
    save_file(renamed, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    one, other = rtn(plain, tmp_path / "one"), rtn(tmp_path / "model", tmp_path / "other")
    assert one.tensors.keys() == other.tensors.keys()
    for name, weight in one.linears.items():
        assert torch.equal(weight.packed_weight, other.linears[name].packed_weight)
    weights = ModelWeights(tmp_path / "model", skeleton(read_config(plain), torch.float32))
    for name, tensor in tensors.items():
        assert torch.equal(weights.read(name, tensor.shape), tensor)


@pytest.mark.parametrize("method", ["rtn", "qllm"])
def test_names_that_nobody_knows_are_told_from_missing_ones(method, folders, tmp_path, capsys):
    shutil.copytree(folders("llama"), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({n.replace("self_attn", "attn0"): t for n, t in load_file(path).items()}, path, {"format": "pt"})
    options = [f"model={tmp_path / 'model'}", f"weights.method={method}", f"output_dir={tmp_path / 'out'}"]
    text = family_matrix.TEXT if method == "qllm" else []
    assert main(["quantize", "weights.scheme=W4A4", *options, *text]) == 2
    said = capsys.readouterr().err
    assert "attn0" in said and "llama does not know" in said and "download" not in said


@pytest.mark.parametrize("method", ["rtn", "qllm"])
def test_a_head_of_its_own_is_kept_although_the_config_ties_it(method, folders, tmp_path):
    """As transformers 5 does: it ties nothing where both are stored with different values."""
    family_models.save("qwen3", tmp_path / "model", tie_word_embeddings=False)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    head = load_file(tmp_path / "model" / "model.safetensors")["lm_head.weight"]
    options = [f"model={tmp_path / 'model'}", f"weights.method={method}", f"output_dir={tmp_path / 'out'}"]
    text = [*family_matrix.TEXT, *family_matrix.TRAIN] if method == "qllm" else []
    assert main(["quantize", "weights.scheme=W4A16", *options, *text]) == 0
    from megatron_lowbit.launch.loading import _from_checkpoint

    checkpoint = LowBitCheckpoint.load(tmp_path / "out")
    model = _from_checkpoint(read_config(tmp_path / "out"), checkpoint, torch.float32)
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("method", ["rtn", "qllm"])
def test_a_quantization_config_is_refused(method, folders, tmp_path, capsys):
    shutil.copytree(folders("llama"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    options = [f"model={tmp_path / 'model'}", f"weights.method={method}", f"output_dir={tmp_path / 'out'}"]
    text = family_matrix.TEXT if method == "qllm" else []
    assert main(["quantize", "weights.scheme=W4A4", *options, *text]) == 2
    said = capsys.readouterr().err
    assert "quantization_config (gptq)" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(("family", "why"), [("gpt2", "no row-parallel nn.Linear"), ("gemma3n_text", "gemma3n_text")])
def test_families_that_are_refused_are_named(family, why, tmp_path):
    found = family_matrix.outcome(family, tmp_path)
    assert found.stages["qllm"] == "refused" and why in found.words


def test_what_stays_in_full_precision_is_told(folders, tmp_path, capsys):
    rtn(folders("deepseek_v3"), tmp_path / "out")
    said = capsys.readouterr().out
    assert (
        "in full precision stay self_attn.q_b_proj, self_attn.kv_b_proj (inputs other than the hidden states)" in said
    )
    experts = "(experts that a router chooses; weights.experts quantizes them)"
    assert f"mlp.experts.gate_up_proj, mlp.experts.down_proj {experts}" in said
    assert "mlp.gate (routers)" in said


def test_flat_activations_are_windows_in_a_row():
    y, mask = torch.randn(3, 5, 4), torch.ones(3, 5, dtype=torch.bool)
    mask[-1, 3:] = False
    flat = as_windows(y.flatten(0, 1), mask)
    assert torch.equal(window_statistics(flat, mask), window_statistics(y, mask))


def test_a_block_that_needs_the_tokens_is_refused(folders):
    source = source_of(folders("llama"))
    embed = source.model.model.forward

    def with_tokens(input_ids, **kwargs):
        for block in source.blocks:
            block.__dict__["forward"] = (lambda f: lambda *a, **k: f(*a, **k, tokens=input_ids))(block.forward)
        return embed(input_ids=input_ids, **kwargs)

    source.model.model.forward = with_tokens
    with pytest.raises(LowBitError, match="llama"):
        source.trace(torch.randint(3, 1000, (1, 16)))


@pytest.mark.slow
@pytest.mark.parametrize("family", family_models.FAMILIES)
def test_every_family_runs_or_is_refused_in_one_line(family, tmp_path):
    found = family_matrix.outcome(family, tmp_path)
    assert "traceback" not in found.stages.values(), found.row()
    if "refused" in found.stages.values():
        assert found.words
