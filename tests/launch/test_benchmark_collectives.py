"""`benchmark collectives` on real processes, over loopback and over slow links, and the peers' scheme beside them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import COMMAND, gone, run_here, run_there, started

from megatron_lowbit.comm.cost import CostTable
from megatron_lowbit.launch.bench import collectives, collectives_rank, netlab, peers

ALGORITHMS = ["bf16", "fp32", "group32", "one_shot", "two_shot", "exact_sum"]
QUICK = ["repeats=3", "cell_seconds=1"]


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "benchmark.json").read_text())["rows"]


# The peers' scheme


def oracle_round_trip(x: np.ndarray) -> np.ndarray:
    """float64 [groups, 32] -> what its message stands for, one value at a time."""
    y = np.zeros_like(x)
    for group, values in enumerate(x):
        scale = float(np.float16(np.float32(max(abs(values))) / np.float32(7)))
        for i, value in enumerate(values):
            code = 0 if scale == 0 else min(7, max(-7, round(float(np.float32(value) / np.float32(scale)))))
            y[group, i] = code * scale
    return y


def awkward_groups(seed: int) -> torch.Tensor:
    """float32 [5, 32]: usual ones, zeros, values below and beyond float16's range, one outlier."""
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)) * torch.tensor([[1.0], [0], [1e-9], [3], [1]])
    x[3, 0], x[4, 7] = 1e6, -40
    return x


def test_groups_travel_in_four_and_a_half_bits():
    x = awkward_groups(0)
    message = peers.quantize_groups(x)
    assert message.shape == (5, 18) and message.dtype == torch.uint8 and 8 * message.nbytes / x.numel() == 4.5
    y = peers.sum_in_order(message.unsqueeze(0)).double().numpy()
    expected = oracle_round_trip(np.clip(x.double().numpy(), -7 * 65504.0, 7 * 65504.0))
    np.testing.assert_array_equal(y, expected)
    step = np.abs(x.double().numpy()).max(1, keepdims=True) / 7  # float16 rounds it by up to 2^-11
    usual = [0, 1, 4]
    assert (np.abs(y - x.double().numpy()) <= step * (0.5 + 7 * 2**-11))[usual].all()


@pytest.mark.parametrize("shape", [(6, 64), (1, 5), (3, 96)])
def test_two_hops_of_groups_match_the_oracle(shape, monkeypatch):
    """All ranks of GroupInt4 in one process: what is sent is kept, and what is received is made of it."""
    size, generator = 3, torch.Generator().manual_seed(1)
    partials = [torch.randn(shape, generator=generator) for _ in range(size)]
    flat = [torch.nn.functional.pad(p.flatten(), (0, -p.numel() % (32 * size))).view(-1, 32) for p in partials]
    messages = torch.stack([peers.quantize_groups(f) for f in flat])  # [sender, group, bytes]
    stripes = [peers.quantize_groups(peers.sum_in_order(part)) for part in messages.chunk(size, 1)]
    monkeypatch.setattr(peers.dist, "get_world_size", lambda group: size)
    monkeypatch.setattr(peers, "all_gather_stack", lambda stripe, group: torch.stack(stripes))
    results = []
    for rank in range(size):

        def exchange(received, message, group, rank=rank):
            assert torch.equal(message, messages[rank])
            received.copy_(messages.chunk(size, 1)[rank].flatten(0, 1))

        monkeypatch.setattr(peers.dist, "all_to_all_single", exchange)
        reducer = peers.GroupInt4(None)
        results.append(reducer.all_reduce(partials[rank]))
        assert reducer.traffic.bytes == 18 * len(flat[0]) * (size + 1) / size
    sums = sum(oracle_round_trip(f.double().numpy()) for f in flat)
    expected = oracle_round_trip(sums).reshape(-1)[: partials[0].numel()].reshape(shape)
    for result in results:
        np.testing.assert_allclose(result.double().numpy(), expected, rtol=1e-6, atol=1e-9)


# The command on loopback


@pytest.fixture(scope="module")
def loopback(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loopback")
    use = ["--ranks", "2", "--sizes", "64KiB", "comm.preset=paper", *QUICK, f"output_dir={folder}"]
    code, stdout, stderr = run_there(*COMMAND, "benchmark", "collectives", *use)
    assert code == 0, stderr
    return folder, stdout, stderr


def test_rows_on_loopback(loopback):
    by_algorithm = {row["algorithm"]: row for row in rows(loopback[0])}
    assert list(by_algorithm) == ALGORITHMS
    for name, row in by_algorithm.items():
        assert row["name"] == f"{name}, 2 ranks, 64KiB"
        assert (row["ranks"], row["bytes"], row["rate"], row["ideal_seconds"]) == (2, 2**16, None, None)
        assert len(row["repetitions"]) == 3 and sorted(row["repetitions"])[1] == row["seconds"]
        assert min(row["repetitions"]) > 0
    # 32 tokens of 1024 features; in the second hop each of two ranks sends half of the tokens.
    bits = {name: row["bits_per_value"] for name, row in by_algorithm.items()}
    hybrid = 4 + 12 / 64
    assert bits == {
        "bf16": 16,
        "fp32": 32,
        "group32": 4.5 + 4.5 / 2,
        "one_shot": hybrid,
        "two_shot": hybrid + (5 + 11 / 64) / 2,
        "exact_sum": 8 * 1025 / 1024,
    }
    # With two ranks a ring, one_shot and both hops of the others all move what is handed over, or half of each hop.
    link = {name: 8 * row["link_bytes"] / 2**15 for name, row in by_algorithm.items()}
    assert link == {**bits, "group32": 4.5, "two_shot": hybrid / 2 + (5 + 11 / 64) / 2}


def test_sums_are_right(loopback):
    sqnr = {row["algorithm"]: row["sqnr_db"] for row in rows(loopback[0])}
    assert sqnr["fp32"] == 300  # two values have one sum
    assert 45 < sqnr["bf16"] < 60  # 8 bits of mantissa
    # 15 steps over about seven standard deviations are 18 dB and more; groups pay for neighbours of unlike widths
    assert 8 < sqnr["group32"] < sqnr["two_shot"] <= sqnr["one_shot"] + 0.5
    assert 16 < sqnr["one_shot"] < 28 < sqnr["exact_sum"] < 40


def test_what_it_writes_and_prints(loopback):
    folder, stdout, stderr = loopback
    record = json.loads((folder / "benchmark.json").read_text())
    assert record["config"]["sizes"] == [2**16] and record["environment"]["versions"]["torch"]
    assert all(name in stdout for name in ALGORITHMS) and "1.00x" in stdout
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["ranks"], line["bytes"]) for line in logged if "step" in line] == [(2, 2**16)]
    # One or the other, whatever is installed here.
    assert (folder / "collectives.png").exists() != ("pip install 'megatron-lowbit[report]'" in stderr)


def test_plot(loopback, tmp_path):
    pytest.importorskip("matplotlib", reason="needs megatron-lowbit[report]")
    measured = rows(loopback[0])
    shaped = [{**row, "ranks": 4, "rate": "1gbit", "ideal_seconds": 1e-3} for row in measured]
    collectives.plot(measured + shaped, tmp_path / "collectives.png")
    assert (tmp_path / "collectives.png").read_bytes()[:4] == b"\x89PNG"


def test_tune(tmp_path):
    """A table per number of ranks, the choices in words, and auto beside the others."""
    use = ["--ranks", "2", "--sizes", "2KiB,16KiB", "--tune", "algorithms=[bf16,one_shot]", *QUICK]
    code, stdout, stderr = run_there(*COMMAND, "benchmark", "collectives", *use, f"output_dir={tmp_path}")
    assert code == 0, stderr
    costs = CostTable.load(tmp_path / "costs-tp2.json")
    assert (costs.tp_size, costs.features) == (2, 1024)
    assert [[size for size, _ in points] for points in costs.rows.values()] == [[2**11, 2**14]] * 4
    automatic = [row for row in rows(tmp_path) if row["algorithm"] == "auto"]
    assert [row["mode"] for row in automatic] == [costs.choose(2**11), costs.choose(2**14)]
    assert f"auto at tp=2: 2KiB {costs.choose(2**11)}, 16KiB {costs.choose(2**14)}" in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "ranks=1: give one or more numbers of ranks from 2 to 64"),
        (["ranks=[2,x]"], "ranks.1='x'"),
        (["--sizes", "64kb"], "'64kb' is no size; write bytes, or 64KiB, 4MiB"),
        (["sizes=[3000]"], "sizes=[3000]: give one or more sizes in multiples of 2KiB"),
        (["--rate", "fast"], "rate='fast': give a rate such as 100mbit, 1gbit or 10gbit"),
        (["algorithms=[oneshot]"], "algorithms.0='oneshot' is not one of bf16, fp32"),
        (["repeats=1"], "repeats=1"),
        (["tp=2"], "tp=2 changes nothing here"),
        (["comm.mode=two_shot"], "comm.mode=two_shot changes nothing here"),
        (["comm.gather=true"], "comm.gather=True changes nothing here"),
        (["rates=1gbit"], "unknown config key 'rates'; did you mean 'rate'?"),
        (["--rank", "2", "--speed", "1"], "unrecognized arguments: --speed"),
    ],
)
def test_bad_values_are_refused_in_one_line(arguments, message, tmp_path, capsys):
    assert run_here("benchmark", "collectives", *arguments, f"output_dir={tmp_path}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_rate_needs_root_and_its_tools(monkeypatch, tmp_path, capsys):
    use = ["benchmark", "collectives", "--rate", "1gbit", f"output_dir={tmp_path}"]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(netlab.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    assert run_here(*use) == 2
    assert "rate=1gbit needs root" in capsys.readouterr().err
    monkeypatch.setattr(netlab.shutil, "which", lambda tool: None if tool == "tc" else f"/usr/bin/{tool}")
    assert run_here(*use) == 2
    assert "rate=1gbit needs tc (Debian and Ubuntu" in capsys.readouterr().err


def test_a_cell_that_hangs_is_given_up(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(collectives, "start_limit", lambda *_: 0.0)
    monkeypatch.setattr(collectives, "cell_limit", lambda *_: 0.0)
    assert run_here("benchmark", "collectives", "--ranks", "2", "--sizes", "64KiB", f"output_dir={tmp_path}") == 2
    assert "ranks=2 sizes=65536 did not finish in time; set a smaller size" in capsys.readouterr().err
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    assert not (tmp_path / "benchmark.json").exists()


# Slow links


def namespaces(owner: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"lowbit-{owner}-")]


@pytest.mark.slow
def test_a_link_holds_its_rate(needs_namespaces, tmp_path):
    use = ["--ranks", "2", "--sizes", "1MiB", "--rate", "1gbit", "algorithms=[one_shot]", *QUICK]
    with started(*COMMAND, "benchmark", "collectives", *use, f"output_dir={tmp_path}") as process:
        assert process.communicate(timeout=300) and process.returncode == 0
        assert not namespaces(process.pid)
    bf16, one_shot = rows(tmp_path)
    assert (bf16["algorithm"], one_shot["algorithm"]) == ("bf16", "one_shot")
    # Either direction carries 2 (N - 1) / N = 1 times the tensor, of which a full bucket passes at once at both ends.
    assert bf16["ideal_seconds"] == 8 * 2**20 / 1e9
    assert min(bf16["repetitions"]) >= 8 * (2**20 - 2 * 2**16) / 1e9
    assert one_shot["ideal_seconds"] == pytest.approx(bf16["ideal_seconds"] * one_shot["bits_per_value"] / 16)
    assert min(one_shot["repetitions"]) >= 8 * (one_shot["link_bytes"] - 2 * 2**16) / 1e9


@pytest.mark.parametrize("ending", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_nothing_is_left_behind(needs_namespaces, tmp_path, ending):
    """Ctrl-C clears up at once; after SIGKILL the ranks end by themselves, and the next run clears up."""
    use = ["--ranks", "2", "--sizes", "64MiB", "--rate", "10mbit", f"output_dir={tmp_path}"]
    with started(*COMMAND, "benchmark", "collectives", *use) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not (ranks := working(process.pid)):
            time.sleep(0.05)
        assert len(namespaces(process.pid)) == 3
        os.kill(process.pid, ending)
        process.communicate(timeout=300)
        assert process.returncode == {signal.SIGINT: 130, signal.SIGKILL: -9}[ending]
        while time.monotonic() < deadline and not all(gone(rank) for rank in ranks):
            time.sleep(0.05)
        assert all(gone(rank) for rank in ranks), [(told(rank, "stat"), told(rank, "wchan")) for rank in ranks]
        if ending == signal.SIGKILL:
            assert netlab.call("up", "1", "1gbit").returncode == 0
            assert netlab.call("down").returncode == 0
        assert not namespaces(process.pid) and not namespaces(os.getpid())


BUSY_RANK = """
import ctypes, os, pathlib, sys
from megatron_lowbit.launch.bench.collectives_rank import _end_with_the_parent
_end_with_the_parent()
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
ctypes.PyDLL(None).sleep(600)  # keeps Python's lock
"""
PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=subprocess.PIPE).wait()"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends it")
def test_a_rank_that_keeps_pythons_lock_ends_with_its_parent(tmp_path):
    told_pid = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", PARENT, "-c", BUSY_RANK, str(told_pid)]) as parent:
        until(lambda: told_pid.exists() and told_pid.read_text() != "", 300)
        rank = int(told_pid.read_text())
        parent.kill()
    try:
        until(lambda: gone(rank), 30)
    finally:
        if not gone(rank):
            os.kill(rank, signal.SIGKILL)


def until(ready: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def working(parent: int) -> list[int]:
    """Process ids of the two ranks once they run in their namespaces."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    python = [int(pid) for pid in children if b"worker" in told(pid, "cmdline").split(b"\0")]
    inside = [pid for pid in python if told(pid, "comm").startswith(b"python")]
    return inside if len(inside) == 2 else []


def told(pid: int | str, what: str) -> bytes:
    """A file of /proc; empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


def test_a_network_whose_owner_is_a_zombie_is_removed(needs_namespaces):
    with subprocess.Popen(["sleep", "600"]) as owner:
        environ = os.environ | {"NETLAB_NAME": f"lowbit-{owner.pid}"}
        subprocess.run(["bash", str(netlab.NETLAB), "up", "1", "100mbit"], env=environ, check=True)
        assert netlab.call("up", "1", "100mbit").returncode == 0 and len(namespaces(owner.pid)) == 2, "its owner runs"
        owner.kill()  # a zombie until the `with` ends
        while not gone(owner.pid):
            time.sleep(0.01)
        assert Path(f"/proc/{owner.pid}").exists() and netlab.call("up", "1", "100mbit").returncode == 0
        assert not namespaces(owner.pid) and netlab.call("down").returncode == 0


def test_taking_a_network_down_twice(needs_namespaces):
    assert netlab.call("up", "2", "100mbit").returncode == 0
    assert len(namespaces(os.getpid())) == 3
    assert netlab.call("up", "1", "100mbit").returncode == 0, "an earlier network is replaced"
    assert len(namespaces(os.getpid())) == 2
    assert netlab.call("down").returncode == netlab.call("down").returncode == 0
    assert not namespaces(os.getpid())
    broken = netlab.call("up", "2", "fast")
    assert broken.returncode and "rate fast is not of the form" in broken.stderr and not namespaces(os.getpid())


def test_sizes_and_rates_as_text():
    assert [collectives_rank.size_text(size) for size in (64, 2**16, 3 * 2**20)] == ["64B", "64KiB", "3MiB"]
    assert collectives_rank.bits_per_second("100mbit") == 1e8 and collectives_rank.bits_per_second("10gbit") == 1e10
