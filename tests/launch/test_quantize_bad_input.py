"""Bad input of method qllm: exit code 2, one line on standard error, no artifact.

Every case is a command line; `{folder}` in it is a folder of prepared models.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import preemption_cases
import pytest
import torch
from commands import CALIBRATION_TEXT, COMMAND, run_here, run_there
from ports import free_port
from rank_pool import RankPool
from safetensors.torch import load_file, save_file
from tiny_models import save_model

from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

TEXT = [
    *(f"calibration.data={CALIBRATION_TEXT}", "calibration.samples=4", "calibration.sequence_length=64"),
    *("reassembly.expansions=[0.05]", "correction.epochs=1", "correction.blocks_per_group=1", "comm.tp_sizes=[2]"),
]
QUANTIZE = ["quantize", "model={folder}/llama", "weights.scheme=W4A4", *TEXT]
DOWN = "model.layers.1.mlp.down_proj.weight"


def of(model: str) -> list[str]:
    return ["quantize", f"model={{folder}}/{model}", "weights.scheme=W4A4", *TEXT]


def rtn(model: str) -> list[str]:
    return ["quantize", f"model={{folder}}/{model}", "weights.scheme=W4A4", "weights.method=rtn"]


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _cut(file: Path, kept: float = 0.5) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def _shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


# {model folder: what is done to a copy of the sound one}
DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing tensor": lambda f: _rewrite(f, lambda t: t.pop(DOWN)),
    "missing norm": lambda f: _rewrite(f, lambda t: t.pop("model.layers.0.input_layernorm.weight")),
    "missing embedding": lambda f: _rewrite(f, lambda t: t.pop("model.embed_tokens.weight")),
    "other shape": lambda f: _rewrite(f, lambda t: t.update({DOWN: t[DOWN][:, :100].clone()})),
    "other norm shape": lambda f: _rewrite(f, lambda t: t.update({"model.norm.weight": torch.ones(32)})),
    "int8": lambda f: _rewrite(f, lambda t: t.update({DOWN: t[DOWN].to(torch.int8)})),
    "float8": lambda f: _rewrite(f, lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)})),
    "truncated": lambda f: _cut(f / "model.safetensors"),
    "truncated in its header": lambda f: _cut(f / "model.safetensors", 0.001),
    "empty file": lambda f: (f / "model.safetensors").write_bytes(b""),
    "no tokenizer": lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
}
SHARD_DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing shard": lambda f: _shards(f)[-1].unlink(),
    "truncated shard": lambda f: _cut(_shard_of(f, DOWN)),
    "broken index": lambda f: _cut(f / "model.safetensors.index.json"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bad-input")
    save_model("llama", root / "llama")
    save_model("phi3", root / "phi3")
    save_model("llama", root / "one-kv-head", num_key_value_heads=1)
    shutil.copytree(root / "llama", root / "sharded")
    tensors = load_file(root / "sharded" / "model.safetensors")
    (root / "sharded" / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number, name in enumerate(sorted(tensors)):  # one tensor per shard
        file = f"model-{number + 1:05d}-of-{len(tensors):05d}.safetensors"
        save_file({name: tensors[name]}, root / "sharded" / file, metadata={"format": "pt"})
        index[name] = file
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for name, damage in DAMAGE.items():
        shutil.copytree(root / "llama", root / name)
        damage(root / name)
    for name, damage in SHARD_DAMAGE.items():
        shutil.copytree(root / "sharded", root / name)
        damage(root / name)
    (root / "few.txt").write_text("def f(x):\n    return x\n")
    return root


# {what is wrong: (command line, what the line has to say)}
CASES = {
    "rank above the width": ([*QUANTIZE, "correction.rank=65"], ["correction.rank=65", "64 channels", "layers.0"]),
    "rank 0": ([*QUANTIZE, "correction.rank=0"], ["correction.rank=0"]),
    "group size": ([*QUANTIZE, "weights.group_size=48"], ["group_size=48", "64"]),
    "group size and a shard": (  # 172 inputs are 4 shards of 43
        [*QUANTIZE, "weights.group_size=4"],
        ["group_size=4", "43"],
    ),
    "too few tokens": ([*QUANTIZE, "calibration.samples=1", "calibration.sequence_length=32"], ["32 tokens", "64"]),
    "text too short": (
        [*QUANTIZE, "calibration.data={folder}/few.txt"],
        ["few.txt", "too short", "calibration.sequence_length"],
    ),
    "text missing": ([*QUANTIZE, "calibration.data={folder}/nowhere.txt"], ["nowhere.txt", "does not exist"]),
    "no text": (
        ["quantize", "model={folder}/llama", "weights.method=qllm"],
        ["weights.method=qllm needs calibration.data"],
    ),
    "no model": (["quantize", *TEXT], ["model"]),
    "an artifact": ([*QUANTIZE, "artifact={folder}/llama"], ["leave artifact out"]),
    "batch above the windows": ([*QUANTIZE, "correction.batch_size=5"], ["correction.batch_size=5", "4"]),
    "learning rate of nothing": ([*QUANTIZE, "correction.learning_rate=0"], ["correction.learning_rate=0"]),
    "learning rate that diverges": (
        [*QUANTIZE, "correction.learning_rate=1e30", "correction.epochs=2"],
        ["correction.learning_rate"],
    ),
    "expansion of more than all": ([*QUANTIZE, "reassembly.expansions=[1.5]"], ["reassembly.expansions"]),
    "no expansions": ([*QUANTIZE, "reassembly.expansions=[]"], ["reassembly.expansions"]),
    "communication without ranks": (
        [*QUANTIZE, "correction.through_communication=true", "comm.allocation=uniform"],
        ["correction.through_communication", "virtual_tp"],
    ),
    "communication in bits that are not known yet": (
        [*QUANTIZE, "correction.through_communication=true", "virtual_tp=2"],
        ["correction.through_communication", "comm.allocation=uniform"],
    ),
    "virtual ranks that do not divide": (
        [*QUANTIZE, "correction.through_communication=true", "comm.allocation=uniform", "virtual_tp=3"],
        ["virtual_tp", "3"],
    ),
    "tp_sizes and MLP": ([*QUANTIZE, "comm.tp_sizes=[8]"], ["comm.tp_sizes", "8", "intermediate_size=172"]),
    "tp_sizes and shard groups": (
        [*QUANTIZE, "weights.shard_groups=1", "comm.tp_sizes=[2]"],
        ["comm.tp_sizes", "2", "weights.shard_groups"],
    ),
    "scheme none": ([*QUANTIZE, "weights.scheme=none"], ["weights.scheme=none"]),
    "missing tensor": (of("missing tensor"), ["lacks the weight", DOWN]),
    "missing norm": (of("missing norm"), ["lacks the weight", "model.layers.0.input_layernorm.weight"]),
    "missing embedding": (of("missing embedding"), ["lacks the weight", "model.embed_tokens.weight"]),
    "other shape": (of("other shape"), [DOWN, "[64, 100]", "[64, 172]"]),
    "other norm shape": (of("other norm shape"), ["model.norm.weight", "[32]", "[64]"]),
    "int8": (of("int8"), [DOWN, "int8"]),
    "float8": (of("float8"), [DOWN, "float8_e4m3fn", "full-precision"]),
    "int8, rtn": (rtn("int8"), [DOWN, "int8", "full-precision"]),
    "float8, rtn": (rtn("float8"), [DOWN, "float8_e4m3fn", "full-precision"]),
    "truncated": (of("truncated"), ["truncated"]),
    "truncated in its header": (of("truncated in its header"), ["truncated in its header"]),
    "empty file": (of("empty file"), ["empty file"]),
    "no tokenizer": (of("no tokenizer"), ["tokenizer"]),
    "missing shard": (of("missing shard"), ["lacks the shard", "model-"]),
    "truncated shard": (of("truncated shard"), [".safetensors' is damaged (", "download it again"]),
    "broken index": (of("broken index"), ["broken index"]),
}


def only_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("megatron-lowbit: ") and "Traceback" not in lines[0]
    return lines[0]


def assert_no_artifact(output: Path) -> None:
    found = {file.name for file in output.iterdir() if file.is_file()} if output.is_dir() else set()
    assert not found & {"lowbit.json", "quantize.json", "config.json"}, found


@pytest.mark.parametrize("command", (rtn, of), ids=("rtn", "qllm"))
def test_the_stored_values_count_whatever_dtype_is_declared(command, folder, tmp_path):
    """One weight in float16, where config.json says float32: both methods take its values, as transformers does."""
    half = tmp_path / "half"
    shutil.copytree(folder / "llama", half)
    _rewrite(half, lambda t: t.update({DOWN: t[DOWN].half()}))
    arguments = [argument.format(folder=tmp_path) for argument in command("half")]
    assert run_here(*arguments, f"output_dir={tmp_path / 'out'}") == 0
    rounded = load_file(half / "model.safetensors")[DOWN].bfloat16()
    rounded = torch.where(rounded.abs() < 2.0**-14, 0, rounded)
    weights = LowBitCheckpoint.load(tmp_path / "out").fingerprint["weights"]
    assert weights[DOWN.removesuffix(".weight")] == int(rounded.view(torch.int16).long().sum())


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, folder, tmp_path, capsys):
    command, said = CASES[case]
    arguments = [argument.format(folder=folder) for argument in command]
    assert run_here(*arguments, f"output_dir={tmp_path / 'output'}") == 2
    line = only_line(capsys.readouterr().err)
    assert all(part in line for part in said), line
    assert_no_artifact(tmp_path / "output")


def test_a_sharded_model_is_the_same_model(folder, tmp_path):
    """So that the damaged shards above are damage to something that works."""
    for name in ("llama", "sharded"):
        arguments = [argument.format(folder=folder) for argument in of(name)]
        assert run_here(*arguments, "correction.mode=none", f"output_dir={tmp_path / name}") == 0
    a, b = (LowBitCheckpoint.load(tmp_path / name) for name in ("llama", "sharded"))
    assert a.linears.keys() == b.linears.keys()
    assert all(torch.equal(a.linears[n].packed_weight, b.linears[n].packed_weight) for n in a.linears)


RANK_CASES = {
    "batch_size and dp": (["dp=2", "correction.batch_size=3"], ["correction.batch_size=3", "dp=2"]),
    "windows and dp": (["dp=2", "correction.batch_size=2", "calibration.samples=3"], ["3 calibration windows", "dp=2"]),
    "tp and the model": (["model={folder}/one-kv-head", "tp=2"], ["tp=2", "num_key_value_heads=1"]),
    "tp and the shard groups": (
        ["tp=2", "weights.shard_groups=1", "comm.tp_sizes=[]"],
        ["tp=2", "weights.shard_groups"],
    ),
    "tp and a fused projection": (["model={folder}/phi3", "tp=2"], ["fused projection", "tp=1"]),
    "a missing tensor": (["model={folder}/missing tensor", "tp=2"], ["lacks the weight", DOWN]),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Two that have imported everything, and make their own process group."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("case", RANK_CASES)
def test_bad_input_of_ranks(case, ranks, folder, tmp_path):
    """Found by both of two ranks that a launcher has started: each says it, with its name."""
    more, said = RANK_CASES[case]
    arguments = [argument.format(folder=folder) for argument in [*QUANTIZE, *more]]
    argv = [*arguments, f"output_dir={tmp_path}"]
    results = ranks.run(preemption_cases.command, free_port(), argv, {}, "", timeout=300)
    assert [code for code, _ in results] == [2, 2], results
    # Rank 0 may also have said, on standard output, what text it has read.
    line = only_line(re.sub(r"^calibration\.data=.*\n", "", results[0][1], flags=re.MULTILINE))
    assert all(part in line for part in said), line
    assert only_line(results[1][1]) == line.replace("megatron-lowbit: ", "megatron-lowbit: rank 1: ")
    assert_no_artifact(tmp_path)


def test_bad_input_of_ranks_of_its_own(folder, tmp_path):
    """A command that starts its ranks: one of them speaks."""
    more, said = RANK_CASES["a missing tensor"]
    arguments = [argument.format(folder=folder) for argument in [*QUANTIZE, *more]]
    code, _, stderr = run_there(*COMMAND, *arguments, f"output_dir={tmp_path}")
    assert code == 2 and all(part in only_line(stderr) for part in said), stderr
    assert_no_artifact(tmp_path)


def test_a_launcher_of_another_size(folder, tmp_path, capsys):
    arguments = [argument.format(folder=folder) for argument in [*QUANTIZE, "tp=2", "dp=2", "--nproc", "2"]]
    assert run_here(*arguments, f"output_dir={tmp_path}") == 2
    assert "tp x dp = 4" in only_line(capsys.readouterr().err)


# --- A full disk


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """small_disk(kilobytes): a folder on a file system of its own, of that size; called again it changes the size."""
    target = tmp_path / "disk"

    def size(kilobytes: int) -> Path:
        mounted = target.exists()
        target.mkdir(exist_ok=True)
        options = f"{'remount,' if mounted else ''}size={kilobytes}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target)], capture_output=True)
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.decode().strip()}")
        return target

    yield size
    if target.is_mount():
        # Lazy: a file may stay mapped until Python collects the garbage of the run that failed.
        subprocess.run(["umount", "--lazy", str(target)], check=True)


@pytest.mark.parametrize("kilobytes", [20, 60])  # room for neither, for the tokenizer and not the weights
def test_a_disk_without_room_for_an_artifact(kilobytes, folder, small_disk, capsys):
    disk = small_disk(kilobytes)
    arguments = [f"model={folder / 'llama'}", "weights.scheme=W8A8", "weights.method=rtn", f"output_dir={disk}"]
    capsys.readouterr()
    assert run_here("quantize", *arguments) == 2
    line = only_line(capsys.readouterr().err)
    assert "cannot write" in line and "free space, or set output_dir" in line
    assert not list(disk.iterdir())


@pytest.mark.parametrize("kilobytes", [100, 200, 400])
def test_full_disk(kilobytes, folder, small_disk, tmp_path, capsys):
    """One line; the artifact that was there stays; with more room the same command finishes."""
    command = [argument.format(folder=folder) for argument in of("llama")]
    disk = small_disk(100_000)
    plain = [argument for argument in command if not argument.startswith(("reassembly", "correction"))]
    assert run_here(*plain, "weights.scheme=W8A8", "weights.method=rtn", f"output_dir={disk}") == 0
    used = sum(file.stat().st_blocks * 512 for file in disk.rglob("*")) // 1024
    small_disk(used + kilobytes)
    capsys.readouterr()
    assert run_here(*command, f"output_dir={disk}") == 2
    line = only_line(capsys.readouterr().err)
    assert "No space left" in line or "cannot" in line, line
    assert LowBitCheckpoint.load(disk).scheme_name == "W8A8"
    small_disk(100_000)
    assert run_here(*command, f"output_dir={disk}") == 0
    there = tmp_path / "there"
    assert run_here(*command, f"output_dir={there}") == 0
    assert (disk / "lowbit.json").read_text() == (there / "lowbit.json").read_text()
