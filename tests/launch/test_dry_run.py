"""configs/ load, and `quantize --dry-run` tells shapes and bytes that are worked out by hand here."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
from commands import run_here

from megatron_lowbit.config import QuantizeConfig, load_config
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PAPER = [config for config in CONFIGS if config.stem not in ("debug_cpu", "w4a8_hybrid")]
# {config and scheme: (hidden size, width of Q, of K and V, intermediate size, blocks)}, from the models' config.json
MODELS = {
    "llama2_70b_w4a4": (8192, 8192, 1024, 28672, 80),
    "gemma2_27b_w6a6": (4608, 4096, 2048, 36864, 46),
    "mistral_nemo_12b_w4a8": (5120, 4096, 1024, 14336, 40),
}
# {config and scheme: all other weights}: embeddings (Gemma's are tied), a block's norms (Gemma has four), the last norm
OTHER = {
    "llama2_70b_w4a4": 2 * 32000 * 8192 + 80 * 2 * 8192 + 8192,
    "gemma2_27b_w6a6": 256000 * 4608 + 46 * 4 * 4608 + 4608,
    "mistral_nemo_12b_w4a8": 2 * 131072 * 5120 + 40 * 2 * 5120 + 5120,
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(config):
    loaded = load_config(QuantizeConfig, str(config), [])
    if config not in PAPER:
        assert loaded.output_dir == f"runs/{config.stem}"
    else:
        assert loaded.output_dir == f"runs/{config.stem}_w4a4"
        assert loaded.weights.scheme == "W4A4" and loaded.weights.method == "qllm"
        assert loaded.architecture and loaded.correction.rank == 4 and loaded.correction.epochs == 10
        assert loaded.correction.blocks_per_group == 4 and loaded.calibration.samples == 128


def test_there_are_configs_of_all_models():
    assert len(PAPER) == 9


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values = {}
    for key, value in tree.items():
        section = isinstance(value, dict) and key != "architecture"
        values |= flat(value, f"{prefix}{key}.") if section else {prefix + key: value}
    return values


def resolved(config: Path, *overrides: str) -> dict[str, Any]:
    return flat(load_config(QuantizeConfig, str(config), list(overrides)).model_dump(mode="json"))


BEFORE = json.loads((Path(__file__).parents[1] / "data" / "configs_before_schemes.json").read_text())


@pytest.mark.parametrize("name", BEFORE["files"])
def test_a_scheme_gives_what_its_own_file_gave(name):
    """The oracle holds what the file of each model and scheme said when there was one; its name still works."""
    model, _, scheme = name.rpartition("_")
    expected = BEFORE["common"] | BEFORE["models"].get(model, {}) | BEFORE["files"][name]
    assert expected.pop("comm.scale") == "rank1", "the first name of per_token"
    expected["comm.scale"] = "per_token"
    assert expected.pop("weights.shard_groups") == 8, "none now chooses it: test_tp_sizes.py"
    folder = CONFIGS[0].parent
    before = resolved(folder / f"{name}.yaml")
    assert {key: before[key] for key in expected} == expected
    if model in BEFORE["models"]:
        assert resolved(folder / f"{model}.yaml", f"weights.scheme={scheme.upper()}") == before


@pytest.fixture
def no_network(monkeypatch):
    connect = socket.socket.connect

    def refuse(self, *args, **kwargs):
        if getattr(self, "family", None) == socket.AF_UNIX:  # to a process of this machine
            return connect(self, *args, **kwargs)
        raise AssertionError("a dry run went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", MODELS)
def test_dry_run(name, tmp_path, no_network, capsys):
    model, _, scheme = name.rpartition("_")
    config = next(config for config in CONFIGS if config.stem == model)
    arguments = [f"weights.scheme={scheme.upper()}", "tp=2", f"output_dir={tmp_path}"]
    assert run_here("quantize", "--config", config, "--dry-run", *arguments) == 0
    *linears, total = json.loads((tmp_path / "quantize.json").read_text())["rows"]
    hidden, q, kv, width, blocks = MODELS[name]
    bits = 6 if name.endswith("w6a6") else 4
    column = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    column |= {"mlp.gate_proj": width, "mlp.up_proj": width}
    row = {"self_attn.o_proj": q, "mlp.down_proj": width}
    assert {r["name"]: (r["parallel"], r["shape"], r["shape_per_rank"]) for r in linears} == {
        **{n: ("column", [size, hidden], [size // 2, hidden]) for n, size in column.items()},
        **{n: ("row", [hidden, size], [hidden, size // 2]) for n, size in row.items()},
    }
    # Codes, and a float32 scale and zero point for every output channel.
    packed = {n: size // 2 * (hidden * bits // 8 + 8) for n, size in column.items()}
    packed |= {n: hidden * (size // 2 * bits // 8 + 8) for n, size in row.items()}
    assert {r["name"]: r["bytes_per_rank"] for r in linears} == packed
    assert {r["shard_groups"] for r in linears} == {8}
    weights = hidden * (q + 2 * kv + 2 * width + q + width) // 2  # of one block on one rank
    assert total["groups"] == math.ceil(blocks / 4) and total["blocks_per_group"] == 4
    assert total["packed_bytes_per_rank"] == blocks * sum(packed.values())
    assert total["other_bytes"] == 2 * OTHER[name]
    # Float32: four blocks, their rounded copies, and nine candidates (eight expansions and none) of gate and up.
    assert total["group_weight_bytes_per_rank"] == 4 * (2 * 4 * weights + 9 * hidden * width)
    assert total["stream_bytes_per_rank"] == 128 * 2048 * hidden * 4  # float32 on a CPU
    assert total["estimated_seconds_per_group"] > 0 and total["rates"]["flops"] > 0
    told = {"metrics.jsonl", "quantize.json", "quantize.yaml", "report.html"}
    assert {file.name for file in tmp_path.iterdir()} <= told
    out = capsys.readouterr().out
    assert "mlp.down_proj" in out and f"{packed['mlp.down_proj']:,}" in out and f"{total['groups']} groups" in out


def test_dry_run_of_a_folder(tmp_path):
    """Without `architecture` the model's own config.json is read; a group of four and one of two."""
    arguments = ["model=embedded", "--dry-run", "dp=2", "calibration.samples=4", "calibration.sequence_length=64"]
    assert run_here("quantize", *arguments, f"output_dir={tmp_path}") == 0
    *linears, total = json.loads((tmp_path / "quantize.json").read_text())["rows"]
    assert [r["shape_per_rank"] for r in linears] == [r["shape"] for r in linears] and len(linears) == 7
    assert total["groups"] == 2
    assert total["stream_bytes_per_rank"] == 2 * 64 * 128 * 4  # each of two ranks has two windows
    assert total["other_bytes"] == 2 * (1024 * 128 + 13 * 128)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["tp=3"], ["tp=3"]),
        (["tp=16"], ["tp=16 does not divide", "num_key_value_heads=8"]),
        (["weights.scheme=none"], ["weights.scheme=none"]),
        (["architecture={model_type: nothing}"], ["architecture", "nothing"]),
    ],
)
def test_dry_run_refuses(change, said, tmp_path, no_network, capsys):
    config = next(config for config in CONFIGS if config.stem == "llama2_70b")
    code = run_here("quantize", "--config", config, "--dry-run", *change, f"output_dir={tmp_path}")
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith("megatron-lowbit: ") and all(part in line for part in said), line


def test_learning_a_rotation_is_a_stage(tmp_path):
    """Twice the epochs, twice the work; blocks are read again in every epoch."""

    def stages(epochs: int) -> dict[str, Any]:
        settings = ["weights.rotation=learned", f"rotation.epochs={epochs}", "rates.flops=1e12", "rates.memory=1e12"]
        settings += ["rates.disk=1e9", "calibration.data=stdlib:calibration", f"output_dir={tmp_path}"]
        assert run_here("quantize", "--dry-run", "model=embedded", "weights.scheme=W4A4", *settings) == 0
        return json.loads((tmp_path / "quantize.json").read_text())["rows"][-1]["stages"]

    one, two = stages(1), stages(2)
    learned = "learned rotation"
    assert one[learned]["disk"] == one["load"]["disk"] and two[learned]["flops"] == 2 * one[learned]["flops"] > 0
    assert {name: work for name, work in one.items() if name != learned} == {
        name: work for name, work in two.items() if name != learned
    }


def test_the_debug_config_runs(tmp_path):
    """For real; fewer samples than it names, because tests share their cores."""
    config = next(config for config in CONFIGS if config.stem == "debug_cpu")
    assert run_here("quantize", "--config", config, "calibration.samples=2", f"output_dir={tmp_path}") == 0
    row = json.loads((tmp_path / "quantize.json").read_text())["rows"][0]
    assert [group["blocks"] for group in row["groups"]] == [[0, 1, 2, 3], [4, 5]]
    checkpoint = LowBitCheckpoint.load(tmp_path)
    assert checkpoint.scheme_name == "W4A4" and checkpoint.attention_bits == 4 and len(checkpoint.linears) == 42
    assert {path.name for path in tmp_path.glob("comm_plan_*.json")} == {"comm_plan_tp2.json", "comm_plan_tp4.json"}
