"""Whose variables say where a process stands: every launcher's, nested ones, and those that do not fit together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from commands import SMALL_TEXT, run_here, run_there, started
from ports import free_port
from tiny_models import save_model
from unfinished_runs import artifact_files, done, quantize, renamed

from megatron_lowbit.config import LowBitError
from megatron_lowbit.runtime.launcher_env import NAMES, Launch, adopt, find_launch, first_of, without_launch

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a1", "MASTER_PORT": "29400"}
# What an sbatch script sees on its first node (Slurm 22.05), and what srun adds for its third task.
BATCH = {
    **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "localhost,n[07-08]", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
}
STEP = {
    **{**BATCH, "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "2"},
    **{"SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost,n08"},
}
OPEN_MPI = {
    **{"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    **{"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "job@1"},
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
FAR = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}  # of mpirun, on two hosts

PORT = 12000 + (16 * 4711 + 2) % 20000


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (BATCH, None),  # the shell of an sbatch: a command there starts its own ranks
        ({**BATCH, "SLURM_STEP_ID": str(0xFFFFFFFA)}, None),  # salloc's interactive step
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun -n1
        (TORCHRUN, Launch("torchrun", 3, 4, 1, "a1", 29400)),
        ({**STEP, **TORCHRUN}, Launch("torchrun", 3, 4, 1, "a1", 29400)),  # srun torchrun
        (STEP, Launch("srun", 2, 4, 0, "localhost", PORT)),
        ({**STEP, "MASTER_ADDR": "b2", "MASTER_PORT": "5"}, Launch("srun", 2, 4, 0, "b2", 5)),
        ({**STEP, "SLURM_STEP_NUM_NODES": "1"}, Launch("srun", 2, 4, 0, "127.0.0.1", PORT)),
        ({**STEP, "PMI_RANK": "2", "PMI_SIZE": "4"}, Launch("srun", 2, 4, 0, "localhost", PORT)),  # srun --mpi=pmi2
        ({**OPEN_MPI, "MASTER_PORT": "77"}, Launch("mpirun", 1, 2, 1, "127.0.0.1", 77)),
        ({**STEP, **OPEN_MPI, "MASTER_PORT": "77"}, Launch("mpirun", 1, 2, 1, "127.0.0.1", 77)),  # its daemon is a step
        ({**STEP, **OPEN_MPI, **FAR, "MASTER_PORT": "77"}, Launch("mpirun", 1, 2, 1, "localhost", 77)),
        ({**HYDRA, "MASTER_PORT": "77", "WORLD_SIZE": "2"}, Launch("mpiexec", 1, 2, 1, "127.0.0.1", 77)),
    ],
)
def test_who_says_where_this_process_stands(environ, expected):
    assert find_launch(environ) == expected
    if expected is not None:
        given = dict(environ)
        adopt(given)
        assert [given[name] for name in NAMES] == [str(getattr(expected, name.lower())) for name in NAMES]
        assert find_launch(given).rank == expected.rank, "what was adopted reads as torchrun's"
    assert find_launch(without_launch(environ)) is None


def test_ports():
    """All ranks of a step agree; other steps and jobs of the neighbourhood have others."""
    ports = {
        find_launch({**STEP, "SLURM_JOB_ID": str(4711 + job), "SLURM_STEP_ID": str(step)}).master_port
        for job in range(8)
        for step in range(8)
    }
    assert len(ports) == 64 and min(ports) >= 12000 and max(ports) < 32000
    assert find_launch(OPEN_MPI).master_port == find_launch({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0"}).master_port


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set but no launcher's rank"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4, WORLD_SIZE=4"),
        ({**TORCHRUN, "RANK": "one"}, "RANK is 'one'"),
        ({**TORCHRUN, "LOCAL_RANK": "9"}, "LOCAL_RANK=9"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        ({key: value for key, value in TORCHRUN.items() if key != "MASTER_ADDR"}, "MASTER_ADDR is not"),
        ({**STEP, "WORLD_SIZE": "8"}, "WORLD_SIZE=8 contradicts SLURM_STEP_NUM_TASKS=4"),
        ({key: value for key, value in STEP.items() if key != "SLURM_LOCALID"}, "SLURM_LOCALID is not set"),
        ({**STEP, "SLURM_STEP_NODELIST": "no-such-host-7"}, "'no-such-host-7' does not resolve"),
        ({**OPEN_MPI, **FAR}, "set MASTER_ADDR"),
    ],
)
def test_what_does_not_fit_together(environ, said):
    with pytest.raises(LowBitError) as error:
        find_launch(environ)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[03-05,7],x", "n03"),
        ("gpu-[12,14-20]-b", "gpu-12-b"),
        ("rack[1-2]n[3-4],y", "rack1n3"),
        ("n[9],n[1-2]", "n9"),
    ],
)
def test_the_first_of_a_host_list(hosts, first):
    assert first_of(hosts) == first


def stand_as(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """This process gets a launcher's variables."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environ", "size"), [(TORCHRUN, 4), (STEP, 4), ({**OPEN_MPI, "MASTER_PORT": "77"}, 2), ({**HYDRA, **BATCH}, 2)]
)
@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (["engine=megatron", "tp=3", "pp=2", "dp=2"], "tp=3 x pp=2 x dp=2 needs 12 processes, there are"),
        (["weights.method=qllm", "tp=4", "dp=4"], "needs tp x dp = 16 processes, there are"),
    ],
)
def test_a_layout_that_is_not_the_launchers(environ, size, layout, sentence, monkeypatch, capsys, tmp_path):
    stand_as(environ, monkeypatch)
    stage = "quantize" if "weights.method=qllm" in layout else "calibrate"
    assert run_here(stage, "model=embedded", *SMALL_TEXT[:1], *layout, f"output_dir={tmp_path}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{sentence} {size}; start that many" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("environ", [TORCHRUN, STEP, OPEN_MPI], ids=["torchrun", "srun", "mpirun"])
@pytest.mark.parametrize(
    "command",
    [
        ["parity", "model=m", "artifact=a", "prompts=p"],
        ["benchmark", "collectives", "ranks=2", "sizes=64KiB"],
        ["benchmark", "kernels", "tokens=8", "features=64", "compile=false"],
        ["benchmark", "linear", "shapes=8x8", "tokens=1"],
        ["benchmark", "model", "models=embedded"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_what_starts_its_own_ranks_refuses_a_launcher(command, environ, monkeypatch, capsys, tmp_path):
    stand_as(environ, monkeypatch)
    assert run_here(*command, f"output_dir={tmp_path}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    size = find_launch(environ).world_size
    assert f"{' '.join(word for word in command if '=' not in word)} is one process" in line
    assert f"a launcher has started {size}: run it without one" in line
    assert not list(tmp_path.iterdir())


# Real processes


def start(stage: str, arguments: list[str], **environ: str) -> subprocess.Popen[str]:
    command = [warm.python(), "-m", f"megatron_lowbit.launch.{stage}", *arguments]
    return subprocess.Popen(
        command, env={**os.environ, **environ}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def slurm(rank: int, job: str) -> dict[str, str]:
    return {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_JOB_ID": job}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=2)


def tensors(folder: Path) -> dict[str, str]:
    """{file: sha256}, but for the file that says how many ranks wrote it and the names that do."""
    return {renamed(name): value for name, value in artifact_files(folder).items() if name != "lowbit.json"}


def test_ranks_that_srun_starts(model, tmp_path):
    """Two tasks with srun's variables find each other, and write the files of one process."""
    assert run_here(*quantize(model, tmp_path / "alone")) == 0
    command, job = quantize(model, tmp_path / "srun", "tp=2")[1:], str(free_port())
    ranks = [start("quantize", command, **slurm(rank, job)) for rank in range(2)]
    told = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    assert told[1][0] == "", "rank 1 speaks too"
    assert tensors(tmp_path / "srun") == tensors(tmp_path / "alone")


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun: apt-get install openmpi-bin")
def test_ranks_that_mpirun_starts(model, tmp_path):
    """The files of one process; SIGUSR1 to mpirun in the middle reaches its ranks, and it ends with their 99."""
    assert run_here(*quantize(model, tmp_path / "alone")) == 0
    module = [sys.executable, "-m", "megatron_lowbit.launch"]
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", *module]
    command += quantize(model, tmp_path / "mpi", "tp=2")
    with started(*command) as mpirun:
        deadline = time.monotonic() + 300
        while not done(tmp_path / "mpi") and mpirun.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        mpirun.send_signal(signal.SIGUSR1)
        _, stderr = mpirun.communicate(timeout=300)
        assert mpirun.returncode == 99 and "stopped by SIGUSR1: after 1 of 2 groups" in stderr
    code, stdout, stderr = run_there(*command)
    assert code == 0 and stdout.count("wrote the plan") == 1, stderr
    assert tensors(tmp_path / "mpi") == tensors(tmp_path / "alone")


def test_ranks_that_do_not_meet(model, tmp_path):
    """Each alone in its own job of two: one line with the place and what to check, in the time that was set."""
    port, nobody = free_port(), free_port()
    torchrun = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MEGATRON_LOWBIT_RENDEZVOUS_SECONDS": "3"}
    command = quantize(model, tmp_path, "tp=2")[1:]
    jobs = {
        f"rank 1 of 2 did not come to 127.0.0.1:{port} within 3 s": {"RANK": "0", "MASTER_PORT": str(port)},
        f"cannot reach rank 0 at 127.0.0.1:{nobody} within 3 s": {"RANK": "1", "MASTER_PORT": str(nobody)},
        "MASTER_ADDR=no-such-host-7 does not resolve": {
            **{"RANK": "1", "MASTER_PORT": "7000", "MASTER_ADDR": "no-such-host-7"}
        },
        "MEGATRON_LOWBIT_RENDEZVOUS_SECONDS='soon'": {
            **{"RANK": "1", "MASTER_PORT": "7000", "MEGATRON_LOWBIT_RENDEZVOUS_SECONDS": "soon"}
        },
    }
    processes = {
        said: start("quantize", command, **{**torchrun, "LOCAL_RANK": "0", **environ}) for said, environ in jobs.items()
    }
    for said, process in processes.items():
        _, stderr = process.communicate(timeout=300)
        lines = [line for line in stderr.splitlines() if not line.startswith("[W")]  # torch's warnings of hosts
        assert process.returncode == 2 and len(lines) == 1 and said in lines[0], stderr
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_signal_while_ranks_wait_for_each_other(model, tmp_path):
    """Rank 0 of 3 is told to stop, rank 1 learns it from rank 0, and neither waits for rank 2."""
    environ = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        start("quantize", quantize(model, tmp_path, "tp=3")[1:], RANK=str(r), LOCAL_RANK=str(r), **environ)
        for r in range(2)
    ]
    try:
        deadline = time.monotonic() + 300
        while connections(int(environ["MASTER_PORT"])) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)  # rank 0 connects to itself, too
        time.sleep(1)
        ranks[0].send_signal(signal.SIGUSR1)
        told = [rank.communicate(timeout=300) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [99, 99], told
        assert "stopped by SIGUSR1: its ranks had not met yet" in told[0][1]
    finally:
        for rank in ranks:
            rank.kill()


def connections(port: int) -> int:
    """How many connections to a port of this machine there are."""
    tables = (Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6"))
    rows = [row.split() for table in tables for row in table]
    return sum(row[3] == "01" and int(row[1].rpartition(":")[2], 16) == port for row in rows)
