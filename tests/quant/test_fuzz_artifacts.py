"""A share of the artifact fuzzer in every run, all of it (20,000) with `-m slow`; and the cases it was written for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from artifact_fuzz import ArtifactFuzz, counts, judge, seal
from commands import CALIBRATION_TEXT, run_here
from safetensors.torch import load_file, save_file
from tiny_models import build, make_artifact, make_stats, save_artifact, save_model

from megatron_lowbit.adapters.huggingface.apply import apply_to_huggingface
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.plan import CalibrationStats, CommPlan
from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.files import sha256
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

QLLM = [
    *(f"calibration.data={CALIBRATION_TEXT}", "calibration.samples=4", "calibration.sequence_length=64"),
    *("weights.scheme=W4A4", "reassembly.mode=fixed", "reassembly.expansion=0.05", "correction.epochs=1"),
    "correction.blocks_per_group=1",
    *("correction.mode=branch", "comm.tp_sizes=[2]"),
]


@pytest.fixture(scope="module")
def fuzzers(tmp_path_factory) -> dict[str, ArtifactFuzz]:
    """Rounded to nearest, with the paper's plan; and of method qllm, with reassembly, a branch and our plan."""
    root = tmp_path_factory.mktemp("fuzz")
    model = build("llama")
    save_artifact(make_artifact(model, "W4A8", (2,)), root / "rtn")
    make_stats(model, (2,)).save(root / "rtn")
    folder = save_model("llama", root / "model")
    assert run_here("quantize", f"model={folder}", *QLLM, f"output_dir={root / 'qllm'}") == 0
    made = {}
    for name, of in (("rtn", model), ("qllm", transformers.AutoModelForCausalLM.from_pretrained(folder).eval())):
        (root / f"{name}-work").mkdir()
        made[name] = ArtifactFuzz(root / name, of, root / f"{name}-work")
    return made


@pytest.mark.parametrize("forge", (False, True), ids=("damaged", "forged"))
@pytest.mark.parametrize("kind", ("rtn", "qllm"))
def test_a_share_of_the_fuzzer(kind, forge, fuzzers):
    outcomes = [fuzzers[kind].trial(seed, forge) for seed in range(30)]
    assert judge(outcomes, forge) == []
    assert counts(outcomes)["refused"] > 15, "it hardly changes anything"


@pytest.mark.slow
@pytest.mark.parametrize("forge", (False, True), ids=("damaged", "forged"))
@pytest.mark.parametrize("kind", ("rtn", "qllm"))
@pytest.mark.parametrize("first", range(1000, 6000, 1000))
def test_the_whole_fuzzer(kind, forge, first, fuzzers):
    outcomes = [fuzzers[kind].trial(seed, forge) for seed in range(first, first + 1000)]
    assert judge(outcomes, forge) == []


# --- Single cases


@pytest.fixture
def artifact(fuzzers, tmp_path) -> Path:
    """A copy of the artifact of method qllm."""
    for name, data in fuzzers["qllm"].files.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def rewrite(path: Path, *steps: tuple[str, object], forge: bool = True) -> None:
    """Set `path`'s entry a.b.c to a value (None: delete it), and put its seal right."""
    meta = json.loads(path.read_text())
    for place, value in steps:
        owner, *keys = meta, *place.split("/")
        for key in keys[:-1]:
            owner = owner[key]
        if value is None:
            del owner[keys[-1]]
        else:
            owner[keys[-1]] = value
    if forge:
        seal(meta)
    path.write_text(json.dumps(meta))


NORM, DOWN = "model.layers.0.post_attention_layernorm", "model.layers.0.mlp.down_proj"
EDITS = {
    "low_rank": ("low_rank", []),
    "reassembly": ("reassembly", {}),
    "shard_groups": ("shard_groups", 4),
    "scheme": ("scheme", "W4A8"),
    "attention_bits": ("attention_bits", 16),
    "one weight": ("fingerprint/weights", {DOWN: 1}),
    "format": ("format", 3),
    "seal": ("json_sha256", None),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_json_is_refused(edit, artifact):
    rewrite(artifact / "lowbit.json", EDITS[edit], forge=False)
    with pytest.raises(LowBitError, match=r"lowbit\.json' was changed or is corrupt \(its checksum differs\)"):
        Artifact.load(artifact)


# Values that no checksum protects from, since it was put right: (file, entry, value, what the line says).
FORGED_JSON = [
    ("lowbit.json", "shard_groups", 0, r"shard_groups"),
    ("lowbit.json", "shard_groups", 1.5, r"shard_groups.*1\.5"),
    ("lowbit.json", "scheme", "W4A9", r"scheme.*W4A9"),
    ("lowbit.json", "scheme", 44, "scheme"),
    ("lowbit.json", "scheme", "W5A4", r"packed_weight is uint8\[\d+, \d+\], not uint8\[any, \d+\]"),
    ("lowbit.json", "attention_bits", 3, "attention_bits"),
    ("lowbit.json", "low_rank", [], r"lora_[ab] belongs to nothing"),
    ("lowbit.json", "reassembly", {}, r"(src_idx|dst_idx|coefficient) belongs to nothing"),
    ("lowbit.json", "in_features", {}, "in_features"),
    ("lowbit.json", f"in_features/{DOWN}", 2**70, "in_features"),
    ("lowbit.json", f"in_features/{DOWN}", None, r"lacks .*down_proj"),
    ("lowbit.json", "in_features/other", 64, r"lacks other\.packed_weight"),
    ("lowbit.json", "fingerprint/weights", {DOWN: 1}, "fingerprint lacks the linear"),
    ("lowbit.json", "fingerprint/weights", "0123", "fingerprint.weights"),
    ("lowbit.json", "files", {"../lowbit.safetensors": 64 * "0"}, "files"),
    ("comm_plan_tp2.json", "tp_size", 2.0, "tp_size"),
    ("comm_plan_tp2.json", "sites", "x", "sites"),
    ("comm_plan_tp2.json", "sites", [DOWN, DOWN], "listed twice"),
    ("comm_plan_tp2.json", "sites", [DOWN], "belongs to nothing"),
    ("comm_plan_tp2.json", "fingerprint/weights", {}, "do not agree on"),
]


@pytest.mark.parametrize(("file", "place", "value", "said"), FORGED_JSON)
def test_forged_json(file, place, value, said, artifact):
    rewrite(artifact / file, (place, value))
    with pytest.raises(LowBitError, match=said) as raised:
        Artifact.load(artifact)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def first(t: torch.Tensor, value: float) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[0] = value
    return t


# {what is wrong: (end of the tensor's name, change, what the line says)}
FORGED_TENSORS = {
    "scale is nan": ("down_proj.scale", lambda t: first(t, float("nan")), r"down_proj\.scale holds NaN or Inf"),
    "scale is 0": ("down_proj.scale", lambda t: first(t, 0.0), r"down_proj\.scale holds a scale of 0"),
    "scale dtype": ("down_proj.scale", lambda t: t.half(), r"scale is float16\[64, 1\], not float32\[64, any\]"),
    "groups": ("down_proj.scale", lambda t: t.repeat(1, 7), "zero_point is"),
    "rows": ("down_proj.zero_point", lambda t: t[:-1], r"zero_point is float32\[63, 1\], not float32\[64, 1\]"),
    "flat codes": ("down_proj.packed_weight", lambda t: t.flatten(), "packed_weight is uint8"),
    "signed codes": ("down_proj.packed_weight", lambda t: t.to(torch.int8), "packed_weight is int8"),
    "source": ("layernorm.src_idx", lambda t: first(t, -1), r"src_idx points outside 0\.\.63"),
    "source beyond": ("layernorm.src_idx", lambda t: first(t, 64), r"src_idx points outside 0\.\.63"),
    "target": ("layernorm.dst_idx", lambda t: first(t, 1), "dst_idx does not begin"),
    "coefficient": ("layernorm.coefficient", lambda t: t[:-1], "coefficient is float32"),
    "branch": ("down_proj.lora_b", lambda t: t[:, :-1], "lora_b is bfloat16"),
    "branch dtype": ("down_proj.lora_a", lambda t: t.float(), "lora_a is float32"),
    "plan scale": ("down_proj.first.scale", lambda t: first(t, float("inf")), r"first\.scale holds NaN or Inf"),
    "senders": ("down_proj.first.scale", lambda t: t[:1], r"first\.scale is float32\[1, 64\], not float32\[2, any\]"),
    "bits": ("down_proj.first.bits", lambda t: first(t, 9), r"first\.bits holds 9"),
    "rank1": ("down_proj.first.rank1", lambda t: t.repeat(2), "rank1 is uint8"),
    "second": ("down_proj.second.bits", lambda t: t[:-1], r"second\.bits is"),
    "center": ("down_proj.center", lambda t: t.double(), "center is float64"),
    "carrier": ("down_proj.carrier_bits", lambda t: t + 1, "carrier_bits is 9"),
}


def forge(folder: Path, ending: str, change) -> Path:
    """Change every tensor of a name that ends so, and put all checksums right; returns the last file changed."""
    changed = None
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        names = [name for name in tensors if name.endswith(ending)]
        if not names or path.name.startswith("calibration"):
            continue
        tensors = {name: (change(t) if name in names else t).contiguous().clone() for name, t in tensors.items()}
        path.unlink()
        save_file(tensors, path)
        described = folder / ("lowbit.json" if path.name.startswith("lowbit") else f"{path.stem}.json")
        place = f"files/{path.name}" if path.name.startswith("lowbit") else "sha256"
        rewrite(described, (place, sha256(path)))
        changed = path
    assert changed is not None, f"nothing ends in {ending}"
    return changed


@pytest.mark.parametrize("case", FORGED_TENSORS)
def test_forged_tensors(case, artifact):
    """One line at load that names the tensor and its file, although every checksum is right."""
    ending, change, said = FORGED_TENSORS[case]
    file = forge(artifact, ending, change)
    prefix = "lowbit-.*" if file.name.startswith("lowbit") else "comm_plan_tp2"
    with pytest.raises(LowBitError, match=rf"{prefix}\.safetensors.*{said}.*write it again"):
        Artifact.load(artifact)


TEXTS = {
    "twice": (lambda t: t.replace("{", '{"shard_groups": 1,', 1), "has the key 'shard_groups' twice"),
    "deep": (lambda t: t.replace('"W4A4"', "[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "nan": (lambda t: t.replace('"W4A4"', "NaN"), "holds NaN"),
    "huge": (lambda t: t.replace('"W4A4"', "9" * 5000), "cannot read"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_strange_json(case, artifact):
    change, said = TEXTS[case]
    path = artifact / "lowbit.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(LowBitError, match=said) as raised:
        Artifact.load(artifact)
    assert "\n" not in str(raised.value)


def test_half_an_artifact_is_refused(artifact):
    """Weights whose JSON is lost would else be left out without a word."""
    (artifact / "lowbit.json").unlink()
    with pytest.raises(LowBitError, match=r"holds lowbit-.*safetensors without lowbit\.json"):
        Artifact.load(artifact)


def test_an_artifact_of_the_format_before_loads_with_a_notice(artifact, fuzzers, caplog):
    for name in ("lowbit.json", "comm_plan_tp2.json", "calibration.json"):
        rewrite(artifact / name, ("format", 3), ("json_sha256", None), forge=False)
    CommPlan.load(artifact, 2)
    LowBitCheckpoint.load(artifact)
    CalibrationStats.load(artifact)
    (notice,) = [record.getMessage() for record in caplog.records if "without checksums" in record.getMessage()]
    assert str(artifact) in notice and "\n" not in notice
    fuzzer = fuzzers["qllm"]
    apply_to_huggingface(fuzzer.model, artifact, 2, "one_shot")
    try:
        assert torch.equal(fuzzer.model(input_ids=fuzzer.ids).logits, fuzzer.wanted[0])
    finally:
        from megatron_lowbit.adapters import patching

        patching.remove(fuzzer.model)


def test_other_widths_than_the_models_are_refused_when_applied(artifact, fuzzers):
    """A forged artifact may be whole in itself: all linears of 65 rows."""
    for leaf in ("packed_weight", "scale", "zero_point", "lora_b"):
        forge(artifact, f"up_proj.{leaf}", lambda t: torch.cat([t, t[:1]]))
    with pytest.raises(LowBitError, match=r"up_proj is \[172, 64\] in the model and \[173, 6\d\] in the artifact"):
        apply_to_huggingface(fuzzers["qllm"].model, artifact, 2)


def test_a_norm_that_holds_nan_is_refused_when_applied(artifact, fuzzers):
    forge(artifact, "post_attention_layernorm.weight", lambda t: first(t, float("nan")))
    with pytest.raises(LowBitError, match=r"layers\.0\.post_attention_layernorm\.weight holds NaN or Inf"):
        apply_to_huggingface(fuzzers["qllm"].model, artifact, 2)


def test_reprs_are_short(fuzzers, artifact):
    loaded, stats = Artifact.load(artifact), CalibrationStats.load(artifact)
    assert loaded.checkpoint is not None
    plan = loaded.plan(2)
    site, linear = plan.sites[DOWN], loaded.checkpoint.linears[DOWN]
    parts = [site, linear, site.first, stats.ranges[2][DOWN], next(iter(loaded.checkpoint.reassembly.values()))]
    for value in (loaded, loaded.checkpoint, plan, stats, *parts, next(iter(loaded.checkpoint.low_rank.values()))):
        assert len(repr(value)) < 700 and "\n" not in repr(value) and "tensor(" not in repr(value)
        assert repr(value).startswith(f"{type(value).__name__}(")
    assert "packed_weight=uint8[64, 86]" in repr(linear), repr(linear)
