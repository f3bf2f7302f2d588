"""export: folders that stock transformers loads, with the logits of the artifact; what a format has no place for."""

import importlib.util
import json
from pathlib import Path

import api_cases
import family_models
import pytest
import torch
from commands import CALIBRATION_TEXT, run_here
from quantize_runs import quantize
from safetensors.torch import load_file
from tiny_models import save_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.compressed_tensors import describe, export_linear
from megatron_lowbit.config import LowBitError, QuantizeConfig
from megatron_lowbit.qllm.resume import State
from megatron_lowbit.quant.affine import QuantizedWeight

TEXT = [f"calibration.data={CALIBRATION_TEXT}", "calibration.samples=4", "calibration.sequence_length=64"]
QLLM = [*TEXT, "comm.tp_sizes=[]", "weights.attention=false", "correction.epochs=1", "correction.batch_size=2"]
RTN = ["weights.method=rtn", "weights.attention=false"]
# Rounding alone; channels reassembled by norms and linears; a branch; R1, R2 and R4; the output projection, tied.
ARTIFACTS = {
    "rounded": [*RTN, "weights.scheme=W4A16"],
    "groups": [*RTN, "weights.scheme=W4A16", "weights.group_size=4"],
    "symmetric": [*RTN, "weights.scheme=W4A16", "weights.symmetric=true", "weights.group_size=4"],
    "int8": [*RTN, "weights.scheme=W8A8", "weights.symmetric=true", "weights.shard_groups=1"],
    "reassembled": [*QLLM, "weights.scheme=W4A8", "reassembly.mode=fixed", "reassembly.expansion=0.1"],
    "branch": [*QLLM, "weights.scheme=W4A8", "reassembly.mode=fixed", "correction.mode=branch"],
    "rotated": [*QLLM, "weights.scheme=W4A8", "weights.preset=best"],
    "head": [*QLLM, "weights.scheme=W4A16", "correction.mode=none", "weights.lm_head_bits=8"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artifacts(model, tmp_path_factory):
    made: dict[str, Path] = {}

    def artifact(name: str) -> Path:
        if name not in made:
            made[name] = quantize(tmp_path_factory.mktemp(name), f"model={model}", *ARTIFACTS[name])
        return made[name]

    return artifact


def export(artifact: Path, folder: Path, *settings: str) -> Path:
    assert run_here("export", f"artifact={artifact}", f"output_dir={folder}", *settings) == 0
    return folder


def logits(model: torch.nn.Module) -> Tensor:
    ids = torch.randint(3, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def loaded(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def exact_logits(model: Path, artifact: Path) -> Tensor:
    """Logits of the artifact on this package's layers, with activations that nothing rounds."""
    checkpoint = lowbit.LowBitCheckpoint.load(artifact)
    scheme = type(checkpoint.scheme)(checkpoint.scheme.weight_bits, 16)
    whole = lowbit.Artifact(lowbit.LowBitCheckpoint(**{**vars(checkpoint), "scheme": scheme, "clipping": {}}))
    return logits(lowbit.apply_to_huggingface(loaded(model), whole))


@pytest.mark.parametrize("name", ["groups", "reassembled", "branch", "rotated", "head"])
def test_merged_weights_compute_what_the_artifact_does(name, model, artifacts, tmp_path):
    folder = export(artifacts(name), tmp_path / "out", "dtype=float32")
    expected, found = exact_logits(model, artifacts(name)), logits(loaded(folder))
    # float32 sums in another order, over two blocks.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4 * float(expected.abs().max()))
    assert (expected - logits(loaded(model))).abs().max() > 1e-3 * expected.abs().max(), "something was quantized"
    assert AutoTokenizer.from_pretrained(folder)("def f").input_ids
    assert not [path for path in folder.iterdir() if path.name.startswith(".export")]


def test_weights_are_bfloat16_unless_asked(artifacts, tmp_path, screen):
    folder = export(artifacts("rounded"), tmp_path)
    assert "merging weights" in screen.getvalue()
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert {tensor.dtype for tensor in whole.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_merged(family, tmp_path):
    model = family_models.save(family, tmp_path / "model")
    settings = ["weights.method=rtn", "weights.scheme=W4A16", "weights.experts=W4A16"]
    artifact = quantize(tmp_path / "artifact", f"model={model}", *settings)
    found = logits(loaded(export(artifact, tmp_path / "out", "dtype=float32")))
    expected = logits(lowbit.apply_to_huggingface(loaded(model), artifact))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4 * float(expected.abs().max()))


needs_compressed_tensors = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)


@needs_compressed_tensors
@pytest.mark.parametrize("name", ["symmetric", "int8"])
def test_compressed_tensors_loads_the_codes(name, model, artifacts, tmp_path):
    """Through transformers and the library of that name: weights to the bit, and logits."""
    folder = export(artifacts(name), tmp_path, "format=compressed-tensors", "dtype=float32")
    whole = loaded(folder)
    expected = logits(lowbit.apply_to_huggingface(loaded(model), artifacts(name)))
    found = logits(whole)
    # Activations in 8 bits: the library's ranges hold 0, ours need not, so codes differ by up to a step of 1/255.
    tolerance = 2e-2 if name == "int8" else 2e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    for fqn, weight in lowbit.LowBitCheckpoint.load(artifacts(name)).linears.items():
        assert torch.equal(whole.get_submodule(fqn).weight.float(), weight.dequantize()), fqn


@needs_compressed_tensors
def test_the_library_unpacks_zero_points(artifacts, tmp_path, screen):
    """transformers 5.23 refuses packed zero points, whose shape it expects unpacked; the library itself reads them."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    folder = export(artifacts("rounded"), tmp_path, "format=compressed-tensors", "dtype=float32")
    assert "packing codes" in screen.getvalue()
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig(**described).config_groups["group_0"]
    tensors = load_file(folder / "model.safetensors")
    for fqn, weight in lowbit.LowBitCheckpoint.load(artifacts("rounded")).linears.items():
        mine = {key.removeprefix(f"{fqn}."): tensor for key, tensor in tensors.items() if key.startswith(f"{fqn}.")}
        found = PackedQuantizationCompressor.decompress(mine, scheme)["weight"]
        assert torch.equal(found, weight.dequantize()), fqn


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_tensors(bits):
    """The bytes by the format's own definition: element i of a row in bits i*b and up of a string of int32."""
    draw = torch.Generator().manual_seed(0)
    weight = QuantizedWeight.from_float(torch.randn(16, 40, generator=draw), bits, group_size=20)
    made = export_linear("fc", weight, packed=True)
    for tensor, values in (
        (made["fc.weight_packed"], weight.codes()),
        (made["fc.weight_zero_point"].T.contiguous(), weight.zero_point.T.to(torch.uint8)),
    ):
        words = tensor.to(torch.int64) & 0xFFFFFFFF
        for column in range(values.shape[1]):
            word, shift = divmod(column * bits, 32)
            assert torch.equal((words[:, word] >> shift) & (2**bits - 1), values[:, column].to(torch.int64))
    assert made["fc.weight_shape"].tolist() == [16, 40] and torch.equal(made["fc.weight_scale"], weight.scale)


REFUSED = {
    "reassembled": "activations of 8 bits",
    "rotated": "activations of 8 bits",
    "head": "a quantized output projection",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_named(name, artifacts, tmp_path, capsys):
    argv = [f"artifact={artifacts(name)}", f"output_dir={tmp_path / 'out'}", "format=compressed-tensors"]
    capsys.readouterr()  # an artifact that was made here and now
    assert run_here("export", *argv) == 2
    said = capsys.readouterr().err
    assert f"compressed-tensors has no place for {REFUSED[name]}" in said and said.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.safetensors"))


AT_THE_END = {  # {format: how to quantize for it}
    "huggingface": {"scheme": "W4A8", "reassembly.mode": "fixed", "reassembly.expansion": 0.1},
    "compressed-tensors": {"scheme": "W4A16", "reassembly.mode": "none", "weights.symmetric": True},
}


@pytest.mark.parametrize("form", AT_THE_END)
def test_quantize_exports_at_its_end(form, two_ranks, model, tmp_path):
    """On two ranks the bytes that one writes, which are those of the command."""
    text = {"samples": 2, "sequence_length": 64}
    values = {**AT_THE_END[form], "calibration": text, "comm.tp_sizes": [], "correction.mode": "none", "export": form}
    one, two = tmp_path / "one", tmp_path / "two"
    result = lowbit.quantize(model, "stdlib:calibration", output_dir=one, **values)
    two_ranks.run(api_cases.quantized, model, two, values)
    export(one, tmp_path / "command", f"format={form}")
    assert result.record["exported"]["name"] == form
    for folder in (one / form, two / form):
        written = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= written.keys()
        assert written == {name: (tmp_path / "command" / name).read_bytes() for name in written}
    assert lowbit.Artifact.load(two).checkpoint is not None


WOULD_BE_REFUSED = {
    "weights.scheme=W4A8": "activations of 8 bits; quantize with W4A16, or with W8A8",
    "weights.scheme=W4A16 calibration.data=stdlib:calibration": "reassembled channels; quantize with reassembly.mode",
    "weights.scheme=W4A16 weights.rotation=hadamard": "inputs rotated online",
    "weights.scheme=W8A8": "several activation scales per token",
    "weights.scheme=W8A8 weights.shard_groups=1": "weights without a zero point",
    "weights.scheme=W4A16 weights.zero_point=real": "whole zero points",
}


@pytest.mark.parametrize("settings", WOULD_BE_REFUSED)
def test_what_has_no_place_is_named_before_it_is_made(settings, model, tmp_path, capsys):
    argv = [f"model={model}", *settings.split(), f"output_dir={tmp_path}", "export=compressed-tensors"]
    assert run_here("quantize", *argv) == 2
    said = capsys.readouterr().err
    assert WOULD_BE_REFUSED[settings] in said and "or export as huggingface" in said and said.count("\n") == 1
    assert not (tmp_path / "lowbit.json").exists()


def test_an_unfinished_run_goes_on_with_another_export():
    """And the names of an artifact's parts, a digest of these settings, are what they were before there was the key."""
    plain, exporting = (State("quantize", QuantizeConfig(export=form), {}) for form in (None, "huggingface"))
    assert plain.settings == exporting.settings and "export" not in plain.settings


def test_an_export_that_fails_leaves_the_artifact(model, tmp_path, capsys):
    (tmp_path / "huggingface").write_text("a file in the way")
    argv = [f"model={model}", *RTN, "weights.scheme=W4A16", f"output_dir={tmp_path}", "export=huggingface"]
    assert run_here("quantize", *argv) == 2
    said = capsys.readouterr().err
    assert "the artifact is written, but not its export: cannot write " in said and said.count("\n") == 1
    assert lowbit.Artifact.load(tmp_path).checkpoint is not None


def test_other_bad_input(model, artifacts, tmp_path, capsys):
    assert run_here("export", f"output_dir={tmp_path / 'out'}") == 2
    assert "artifact is not set" in capsys.readouterr().err
    own = artifacts("rounded")
    assert run_here("export", f"artifact={own}", f"output_dir={own}") == 2
    assert "output_dir is the artifact's own folder" in capsys.readouterr().err
    assert run_here("export", f"artifact={own}", f"output_dir={tmp_path}", "format=gguf") == 2
    assert "compressed-tensors" in capsys.readouterr().err
    beyond = QuantizedWeight.from_float(torch.rand(4, 8) + 3, 4)  # its ranges do not hold 0
    with pytest.raises(LowBitError, match="whole zero points from 0 to 15: fc has others"):
        export_linear("fc", beyond, packed=True)
    with pytest.raises(LowBitError, match="weights without a zero point: fc has others"):
        export_linear("fc", beyond, packed=False)


def test_linears_that_stay_are_ignored(model, artifacts):
    checkpoint = lowbit.LowBitCheckpoint.load(artifacts("groups"))
    described = describe(loaded(model), checkpoint, "pack-quantized")
    assert described["ignore"] == ["lm_head"]
    assert described["config_groups"]["group_0"]["weights"]["group_size"] == 4
