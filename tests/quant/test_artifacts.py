"""Artifacts on disk: bit-exact round trips, and damage, strangers and half-written files refused in one line."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import run_here
from torch import nn

from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.plan import CalibrationStats, CommPlan, FeatureRange, SitePlan
from megatron_lowbit.config import LowBitError, WeightsConfig
from megatron_lowbit.io.files import all_or_nothing, ensure_writable, read_json, write_json, write_sealed, writing
from megatron_lowbit.io.fingerprint import check_fingerprint, model_fingerprint
from megatron_lowbit.quant.affine import QuantizedWeight, Scheme
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.round_to_nearest import quantize_model

SITE = "model.layers.0.mlp.down_proj"
FINGERPRINT = {"model_type": "llama", "hidden_size": 8, "weights": {SITE: 123, "o_proj": -5, "q_proj": 2**40}}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_stats() -> CalibrationStats:
    def ranges(size: int) -> dict[str, FeatureRange]:
        return {
            SITE: FeatureRange(*(normal(size, 5, seed=seed) for seed in range(4)), normal(size)),
            "model.tp2.o_proj": FeatureRange(normal(size, 5), normal(size, 5, seed=1)),
        }

    return CalibrationStats({size: ranges(size) for size in (1, 2, 8)}, FINGERPRINT)


def make_plan(size: int = 2) -> CommPlan:
    sites = {
        SITE: SitePlan(codec(size, [4, 16, 4, 4, 16]), codec(1, [8] * 5), normal(size, 5), normal(5).abs(), 16),
        "o_proj": SitePlan(codec(size, [8, 2, 3], per_token=True), None, normal(size, 3), normal(3).abs()),
    }
    return CommPlan(sites, size, FINGERPRINT, "hybrid int4/bf16", {"q_proj": codec(1, [4, 4, 16])})


def codec(senders: int, bits: list[int], per_token: bool = False) -> Codec:
    qparams = normal(senders, len(bits)), normal(senders, len(bits), seed=1).round()
    return Codec(*qparams, torch.tensor(bits, dtype=torch.uint8), per_token)


def make_checkpoint() -> LowBitCheckpoint:
    linears = {
        SITE: QuantizedWeight.from_float(normal(3, 9), 6, group_size=3),
        "q_proj": QuantizedWeight.from_float(normal(4, 7), 6),
    }
    tensors = {"model.norm.weight": normal(8).bfloat16(), "lm_head.weight": normal(4, 8), "count": torch.tensor(3)}
    return LowBitCheckpoint(linears, tensors, Scheme.parse("W6A6"), "W6A6", 4, FINGERPRINT)


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype and torch.equal(a, b)


def test_calibration_stats_round_trip(tmp_path):
    stats = make_stats()
    stats.save(tmp_path)
    loaded = CalibrationStats.load(tmp_path)
    assert loaded.fingerprint == stats.fingerprint
    assert {size: set(sites) for size, sites in loaded.ranges.items()} == {
        size: set(sites) for size, sites in stats.ranges.items()
    }
    for size, sites in stats.ranges.items():
        for site, ranges in sites.items():
            found = loaded.ranges[size][site].tensors()
            assert found.keys() == ranges.tensors().keys() and len(found) == (5 if site == SITE else 2)
            for name, tensor in ranges.tensors().items():
                assert_same(found[name], tensor)


def test_comm_plan_round_trip(tmp_path):
    plan = make_plan()
    plan.save(tmp_path)
    loaded = CommPlan.load(tmp_path, 2)
    assert (loaded.tp_size, loaded.fingerprint, loaded.description) == (2, plan.fingerprint, plan.description)
    assert loaded.sites.keys() == plan.sites.keys() and loaded.gathers.keys() == plan.gathers.keys()
    for stored, found in ((plan.sites, loaded.sites), (plan.gathers, loaded.gathers)):
        for name, site in stored.items():
            assert found[name].tensors().keys() == site.tensors().keys()
            for leaf, tensor in site.tensors().items():
                assert_same(found[name].tensors()[leaf], tensor)
    site, other = loaded.sites[SITE], loaded.sites["o_proj"]
    assert (site.carrier_bits, site.first.per_token, site.tp_size) == (16, False, 2) and site.second is not None
    assert other.second is None and other.first.per_token and other.first.bits.tolist() == [8, 2, 3]


def test_checkpoint_round_trip(tmp_path):
    checkpoint = make_checkpoint()
    checkpoint.save(tmp_path)
    loaded = LowBitCheckpoint.load(tmp_path)
    assert loaded.scheme == checkpoint.scheme and loaded.scheme_name == "W6A6" and loaded.shard_groups == 4
    assert loaded.fingerprint == FINGERPRINT
    assert loaded.tensors.keys() == checkpoint.tensors.keys()
    for name, tensor in checkpoint.tensors.items():
        assert_same(loaded.tensors[name], tensor)
    assert loaded.linears.keys() == checkpoint.linears.keys()
    for name, weight in checkpoint.linears.items():
        assert (loaded.linears[name].num_bits, loaded.linears[name].in_features) == (6, weight.in_features)
        assert_same(loaded.linears[name].dequantize(), weight.dequantize())


def test_artifact_loads_what_the_folder_holds(tmp_path):
    for size in (2, 8):
        make_plan(size).save(tmp_path)
    plans_only = Artifact.load(tmp_path)
    assert plans_only.checkpoint is None and sorted(plans_only.plans) == [2, 8]
    assert plans_only.plan(8).sites[SITE].first.scale.shape == (8, 5)
    make_checkpoint().save(tmp_path)
    both = Artifact.load(str(tmp_path))
    assert both.checkpoint is not None and sorted(both.plans) == [2, 8] and both.folder == tmp_path


def test_checkpoint_bytes(tmp_path):
    """What nbytes counts is what the file holds after its header. 9 codes of 6 bits are three runs of 4: 9 bytes."""
    checkpoint = make_checkpoint()
    packed = 3 * 9 + 2 * 3 * 3 * 4 + 4 * 6 + 2 * 4 * 4  # codes, then scale and zero point; each linear
    assert checkpoint.nbytes() == packed + 8 * 2 + 4 * 8 * 4 + 8
    checkpoint.save(tmp_path)
    data = (tmp_path / "lowbit.safetensors").read_bytes()
    assert len(data) == 8 + int.from_bytes(data[:8], "little") + checkpoint.nbytes()


SAVED = [  # how to write one, how to read it, the stem of its two files
    (make_stats, CalibrationStats.load, "calibration"),
    (make_plan, lambda folder: CommPlan.load(folder, 2), "comm_plan_tp2"),
    (make_checkpoint, LowBitCheckpoint.load, "lowbit"),
    (make_checkpoint, Artifact.load, "lowbit"),
    (make_plan, Artifact.load, "comm_plan_tp2"),
]
every_artifact = pytest.mark.parametrize(("make", "load", "stem"), SAVED)


@every_artifact
@pytest.mark.parametrize("kept", (0, 4, 100, -1))
def test_truncated_tensors(tmp_path, make, load, stem, kept):
    make().save(tmp_path)
    path = tmp_path / f"{stem}.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(LowBitError, match=rf"{stem}\.safetensors' is truncated or corrupt.*write it again"):
        load(tmp_path)


@every_artifact
@pytest.mark.parametrize("position", (0, 20, -1))
def test_one_corrupted_byte(tmp_path, make, load, stem, position):
    make().save(tmp_path)
    path = tmp_path / f"{stem}.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(LowBitError, match="truncated or corrupt"):
        load(tmp_path)


@every_artifact
def test_missing_tensors(tmp_path, make, load, stem):
    make().save(tmp_path)
    (tmp_path / f"{stem}.safetensors").unlink()
    with pytest.raises(LowBitError, match=f"cannot read .*{stem}.*No such file"):
        load(tmp_path)


@every_artifact
def test_missing_json(tmp_path, make, load, stem):
    """Tensors without their JSON are an artifact whose writing was interrupted: it does not exist."""
    make().save(tmp_path)
    (tmp_path / f"{stem}.json").unlink()
    with pytest.raises(LowBitError, match=r"cannot read|it has none|without (lowbit|comm_plan_tp2)\.json"):
        load(tmp_path)


@every_artifact
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\x00" + text[1:],
        lambda text: "{}",
        lambda text: "[]",
        lambda text: text.replace('"fingerprint"', '"fingerprinu"'),
    ],
    ids=("half", "empty", "garbage", "object", "list", "key"),
)
def test_damaged_json(tmp_path, make, load, stem, damage):
    make().save(tmp_path)
    path = tmp_path / f"{stem}.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(LowBitError, match=f"{stem}.*write it again"):
        load(tmp_path)


@every_artifact
def test_other_format(tmp_path, make, load, stem):
    make().save(tmp_path)
    path = tmp_path / f"{stem}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(LowBitError, match=r"has format 99; this version reads (6, 5, )?4 and 3"):
        load(tmp_path)


def test_a_plan_of_another_size(tmp_path):
    with pytest.raises(LowBitError, match=r"no communication plan for tp_size 4 \(it has none\).*comm\.tp_sizes=\[4\]"):
        CommPlan.load(tmp_path, 4)
    make_plan(2).save(tmp_path)
    make_plan(8).save(tmp_path)
    with pytest.raises(LowBitError, match=r"for tp_size 4 \(it has plans for tp_size \[2, 8\]\)"):
        CommPlan.load(tmp_path, 4)
    with pytest.raises(LowBitError, match=r"tp_size 4 \(there are \[2, 8\]\).*comm\.tp_sizes=\[4\]"):
        Artifact.load(tmp_path).plan(4)
    for suffix in ("json", "safetensors"):  # renamed by hand
        os.rename(tmp_path / f"comm_plan_tp2.{suffix}", tmp_path / f"comm_plan_tp4.{suffix}")
    with pytest.raises(LowBitError, match="was calibrated for tp_size 2, not 4"):
        CommPlan.load(tmp_path, 4)


def test_a_folder_without_artifacts(tmp_path):
    with pytest.raises(LowBitError, match=r"holds no lowbit\.json and no comm_plan_tp"):
        Artifact.load(tmp_path)
    with pytest.raises(LowBitError, match="nowhere' does not exist"):
        Artifact.load(tmp_path / "nowhere")


# --- Fingerprints


def config(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**{"model_type": "llama", "hidden_size": 8, "vocab_size": 16, **changes})


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Two blocks of two linears, of values that bfloat16 can hold."""
    names = [f"model.layers.{block}.mlp.{name}" for block in (0, 1) for name in ("up_proj", "down_proj")]
    return {name: normal(4, 8, seed=seed).bfloat16().to(dtype) for seed, name in enumerate(names)}


def test_fingerprint_does_not_depend_on_the_dtype():
    expected = model_fingerprint(config(), weights())
    assert model_fingerprint(config(), weights(torch.bfloat16)) == expected
    assert expected["hidden_size"] == 8 and "head_dim" not in expected  # a field the config lacks
    reversed_order = dict(reversed(weights().items()))
    assert model_fingerprint(config(), reversed_order) == expected
    transposed = {name: weight.t().contiguous().t() for name, weight in weights().items()}
    assert model_fingerprint(config(), transposed) == expected


def test_fingerprint_of_a_bf16_checkpoint_is_the_same_in_float16():
    """float16 holds every bf16 value but the very large, and the tiny, which count as 0."""
    stored = {"model.layers.0.mlp.down_proj": torch.cat([normal(4, 8), 1e-7 * normal(4, 8)]).bfloat16()}
    half = {name: weight.half() for name, weight in stored.items()}
    assert not torch.equal(half["model.layers.0.mlp.down_proj"].bfloat16(), stored["model.layers.0.mlp.down_proj"])
    assert model_fingerprint(config(), half) == model_fingerprint(config(), stored)


def test_fingerprint_of_float32_weights_is_that_of_their_bf16_rounding():
    """A float32 checkpoint loaded as bfloat16 is the same model."""
    whole = {"model.layers.0.mlp.down_proj": normal(4, 8)}
    rounded = {name: weight.bfloat16() for name, weight in whole.items()}
    assert not torch.equal(rounded["model.layers.0.mlp.down_proj"].float(), normal(4, 8))
    assert model_fingerprint(config(), rounded) == model_fingerprint(config(), whole)


@pytest.mark.parametrize("name", sorted(weights()))
def test_fingerprint_sees_every_block(name):
    changed = weights()
    changed[name][3, 2] *= 2
    assert model_fingerprint(config(), changed)["weights"] != model_fingerprint(config(), weights())["weights"]


def test_the_error_says_what_differs():
    here = model_fingerprint(config(), weights())
    check_fingerprint("the checkpoint", dict(here), here)
    with pytest.raises(LowBitError) as raised:
        check_fingerprint("the plan", model_fingerprint(config(hidden_size=64, head_dim=4), weights()), here)
    message = str(raised.value)
    assert message.startswith("the plan belongs to another model (")
    assert "hidden_size 64 there, 8 here" in message and "head_dim 4 there, None here" in message
    assert "vocab_size" not in message and "weights" not in message
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(LowBitError, match=f"other values in 1 of 4 weights, the first {name}"):
        check_fingerprint("the plan", here | {"weights": here["weights"] | {name: 0}}, here)


def test_linears_that_one_side_does_not_know_do_not_count():
    """An engine may keep some linears in layers of its own; one without any in common is another model."""
    here = model_fingerprint(config(), weights())
    fewer = dict(list(here["weights"].items())[1:])
    check_fingerprint("the plan", here | {"weights": fewer}, here)
    check_fingerprint("the plan", here, here | {"weights": fewer})
    with pytest.raises(LowBitError, match="another model"):
        check_fingerprint("the plan", here | {"weights": {}}, here)


# --- Atomic writes


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@every_artifact
@pytest.mark.parametrize("failing_call", (1, 2))  # of the tensors, of the JSON
def test_a_failed_write_leaves_nothing_new(tmp_path, monkeypatch, make, load, stem, failing_call):
    calls = []
    replace = os.replace

    def full_disk(source, target):
        calls.append(target)
        if len(calls) == failing_call:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("megatron_lowbit.io.files.os.replace", full_disk)
    with pytest.raises(LowBitError, match=f"cannot write .*{stem}.*No space left"):
        make().save(tmp_path)
    # The JSON comes last, so without it there is no artifact, whatever else is there.
    assert set(files(tmp_path)) == ({f"{stem}.safetensors"} if failing_call == 2 else set())
    monkeypatch.undo()
    make().save(tmp_path)
    assert set(files(tmp_path)) == {f"{stem}.safetensors", f"{stem}.json"}
    load(tmp_path)


def test_a_failed_write_keeps_the_old_artifact(tmp_path, monkeypatch):
    make_plan().save(tmp_path)
    before = files(tmp_path)

    def broken(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("megatron_lowbit.io.files.os.replace", broken)
    with pytest.raises(LowBitError, match="Input/output error"):
        CommPlan(make_plan().sites, 2, FINGERPRINT, "another").save(tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("number", "helps"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "delete files of yours"),
        (errno.EROFS, "a disk that can be written to"),
        (errno.EACCES, "ask for the right to write there"),
        (errno.EIO, "choose another output_dir"),
    ],
)
@pytest.mark.parametrize("kind", ["OSError", "Rust"])
def test_what_cannot_be_written_is_told_with_what_helps(number, helps, kind, tmp_path):
    """safetensors and tokenizers, which are in Rust, have the number in the text alone."""
    error = OSError(number, "") if kind == "OSError" else Exception(f"I/O error: a text (os error {number})")
    with pytest.raises(LowBitError) as raised, writing(tmp_path / "file"):
        raise error
    assert str(raised.value).startswith(f"cannot write '{tmp_path}/file': {os.strerror(number)}; ")
    assert helps in str(raised.value)


def test_other_errors_are_not_taken_for_a_disk_s(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        raise ZeroDivisionError


def test_files_that_belong_together_are_written_all_or_not_at_all(tmp_path):
    (tmp_path / "before").touch()
    with pytest.raises(LowBitError), all_or_nothing(tmp_path):
        (tmp_path / "new").touch()
        raise LowBitError("no room")
    assert set(files(tmp_path)) == {"before"}
    with all_or_nothing(tmp_path):
        (tmp_path / "new").touch()
    assert set(files(tmp_path)) == {"before", "new"}
    with pytest.raises(LowBitError, match="no room"), all_or_nothing(tmp_path / "of another machine"):
        raise LowBitError("no room")


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(LowBitError, match="cannot write"):
        make_stats().save(tmp_path / "nowhere")


def test_write_json(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"rows": [1, 2]})
    write_json(path, {"rows": [3]})
    assert json.loads(path.read_text()) == {"rows": [3]} and list(files(tmp_path)) == ["results.json"]
    with pytest.raises(TypeError):
        write_json(path, {"rows": object()})
    assert json.loads(path.read_text()) == {"rows": [3]} and list(files(tmp_path)) == ["results.json"]


def test_ensure_writable(tmp_path):
    folder = ensure_writable(tmp_path / "a" / "b")
    assert folder.is_dir() and not files(folder)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LowBitError, match="is not writable"):
            ensure_writable(path)


# --- What a checkpoint is made of


class Tied(nn.Module):
    """Two linears to quantize, a norm, and an output matrix that is the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.embedding.weight


def test_quantize_model():
    torch.manual_seed(0)
    model = Tied()
    linears = {"up": model.up, "down": model.down}
    settings = WeightsConfig(scheme="W4A8", group_size=4, shard_groups=2)
    checkpoint = quantize_model(model, linears, settings, FINGERPRINT, torch.bfloat16)
    assert checkpoint.scheme == Scheme(4, 8) and checkpoint.scheme_name == "W4A8" and checkpoint.shard_groups == 2
    for name, linear in linears.items():
        expected = QuantizedWeight.from_float(linear.weight, 4, group_size=4)
        assert_same(checkpoint.linears[name].dequantize(), expected.dequantize())
    # The tied matrix is stored once; a bias of a quantized linear is kept.
    assert set(checkpoint.tensors) == {"embedding.weight", "up.bias", "norm.weight", "norm.bias"}
    assert_same(checkpoint.tensors["up.bias"], model.up.bias.bfloat16())


@pytest.mark.parametrize("clipping", ("none", "mse"))
def test_quantize_model_with_real_zero_points(clipping):
    model = Tied()
    settings = WeightsConfig(scheme="W4A8", group_size=4, zero_point="real", clipping=clipping)
    weight = quantize_model(model, {"up": model.up}, settings, FINGERPRINT).linears["up"]
    assert (weight.zero_point != weight.zero_point.round()).all()


def test_quantize_model_refuses():
    model = Tied()
    with pytest.raises(LowBitError, match=r"weights\.scheme=none quantizes no weights"):
        quantize_model(model, {"up": model.up}, WeightsConfig(scheme="none"), FINGERPRINT)
    with pytest.raises(LowBitError, match=r"weights\.group_size=5 does not divide the 8 inputs of up"):
        quantize_model(model, {"up": model.up}, WeightsConfig(scheme="W4A16", group_size=5), FINGERPRINT)
    model.up.weight.data[0, 0] = torch.nan
    with pytest.raises(LowBitError, match="up holds NaN"):
        quantize_model(model, {"up": model.up}, WeightsConfig(scheme="W4A16"), FINGERPRINT)


# Config, generation config and tokenizer beside a checkpoint.

BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def whole_artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run_here("quantize", "model=embedded", "weights.scheme=W4A16", f"output_dir={folder}") == 0
    return folder


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("damage", ["one bit", "missing"])
def test_files_beside_a_checkpoint_are_verified(whole_artifact, tmp_path, capsys, name, damage):
    folder = tmp_path / "artifact"
    shutil.copytree(whole_artifact, folder)
    LowBitCheckpoint.load(folder)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data) if damage == "one bit" else (folder / name).unlink()
    assert run_here("generate", f"artifact={folder}", "prompt=def", "max_new_tokens=1", f"output_dir={tmp_path}") == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and f"{name}' is missing or not what was written with the artifact" in line


def test_an_artifact_that_knows_nothing_of_the_files_beside_it_loads(whole_artifact, tmp_path):
    folder = tmp_path / "artifact"
    shutil.copytree(whole_artifact, folder)
    meta = read_json(folder / "lowbit.json")
    assert set(meta.pop("beside")) == set(BESIDE)
    meta.pop("json_sha256")
    write_sealed(folder / "lowbit.json", meta)
    (folder / "config.json").write_text("{}")
    assert LowBitCheckpoint.load(folder).scheme_name == "W4A16"
