"""What happens under every launcher when something goes wrong: python tests/helpers/fault_matrix.py [WORD ...]

Only rows that hold all the words are run. Launchers, ranks and faults are real, mpirun where it is installed (apt-get
install openmpi-bin); srun is its variables set by hand (tests of Slurm itself: make test-slurm). Each row: the fault;
what the command ended with, and how long after the fault; how long the same command then took to finish; whether its
artifacts are, by SHA-256, those of an undisturbed run: for quantize, of one process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONSAFEPATH": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from commands import CALIBRATION_TEXT, EVALUATION_TEXT
from ports import free_port
from tiny_models import embedded_folder, save_model
from unfinished_runs import artifact_files, done, metrics, quantize, renamed

PYTHON = sys.executable
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
DEEPSPEED = [PYTHON, "-m", "deepspeed.launcher.runner"]
TEXT = [f"calibration.data={CALIBRATION_TEXT}", "calibration.samples=24", "calibration.sequence_length=64"]
TEXT += [f"evaluation.data={EVALUATION_TEXT}", "evaluation.samples=24", "evaluation.sequence_length=64"]
TEXT += ["calibration.batch_size=1", "evaluation.batch_size=1"]

Command = tuple[list[str], dict[str, str]]


def launch(launcher: str, stage: str, arguments: list[str], work: Path) -> list[Command]:
    """The commands that start two ranks; more than one where somebody else would start each."""
    module, port = f"megatron_lowbit.launch.{stage}", str(free_port())
    if launcher == "alone":
        return [([PYTHON, "-m", "megatron_lowbit.launch", stage, *arguments], {})]
    if launcher == "torchrun c10d":
        where = ["--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        return [([*TORCHRUN, *where, "-m", module, *arguments], {})]
    if launcher == "torchrun static":
        return [([*TORCHRUN, "--master-addr", "127.0.0.1", "--master-port", port, "-m", module, *arguments], {})]
    if launcher == "deepspeed":
        return [([*DEEPSPEED, "--master_port", port, "--num_accelerators", "2", "--module", module, *arguments], {})]
    if launcher == "deepspeed hostfile":
        hosts = work / "hostfile"
        hosts.write_text("node-a slots=1\nnode-b slots=1\n")
        common = [*DEEPSPEED, "--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
        return [([*common, "--node_rank", str(n), "--module", module, *arguments], {}) for n in range(2)]
    if launcher == "mpirun":
        return [([*MPIRUN, PYTHON, "-m", module, *arguments], {})]
    shared = {"SLURM_JOB_ID": port, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    command = [PYTHON, "-m", module, *arguments]
    return [(command, {**shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}) for rank in range(2)]


@contextlib.contextmanager
def running(commands: list[Command], folder: Path) -> Iterator[list[psutil.Popen]]:
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for number, (command, environ) in enumerate(commands):
        with open(folder / f".out{number}", "w") as out:  # USR1 is for the ranks: as a batch script's trap "" USR1
            ignore = ["bash", "-c", 'trap "" USR1; exec "$@"', "bash"]
            processes.append(
                psutil.Popen([*ignore, *command], env={**os.environ, **environ}, stdout=out, stderr=subprocess.STDOUT)
            )
    try:
        yield processes
    finally:
        for process in family(processes):
            with contextlib.suppress(psutil.Error):
                process.kill()


def family(processes: list[psutil.Popen]) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found += [process, *process.children(recursive=True)]
    return found


def rank(processes: list[psutil.Popen], wanted: int) -> psutil.Process:
    """The process that is that rank: the innermost of its launcher's."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    matching = []
    for process in family(processes):
        with contextlib.suppress(psutil.Error):
            environ = process.environ()
            number = next((environ[name] for name in names if name in environ), None)
            if number == str(wanted) and any("megatron_lowbit.launch" in part for part in process.cmdline()):
                matching.append(process)
    return matching[-1]


def finish(processes: list[psutil.Popen], limit: float = 180) -> list[int]:
    deadline = time.monotonic() + limit
    return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]


def last_line(folder: Path) -> str:
    for number in range(2):
        with contextlib.suppress(OSError):
            lines = (folder / f".out{number}").read_text().splitlines()
            for line in lines:
                if line.startswith("megatron-lowbit: "):
                    return line.removeprefix("megatron-lowbit: ").replace(str(folder), "OUT")
    return ""


def strike(fault: str, processes: list[psutil.Popen]) -> None:
    if fault == "USR1 to one rank":
        rank(processes, 1).send_signal(signal.SIGUSR1)
    elif fault == "SIGKILL of rank 1":
        rank(processes, 1).kill()
    elif fault == "SIGKILL of rank 0":
        rank(processes, 0).kill()
    elif fault.endswith("to the launcher"):
        processes[0].send_signal(signal.SIGUSR1 if fault.startswith("USR1") else signal.SIGTERM)
    elif fault == "TERM to all":
        for process in family(processes):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGTERM)


def row(launcher: str, stage: str, fault: str, arguments: list[str], whole: dict[str, str] | None, work: Path) -> str:
    folder = Path(tempfile.mkdtemp(dir=work)) / "out"
    own = [*arguments, f"output_dir={folder}"]
    ended, after, mounted = "-", 0.0, False
    if fault == "disk full":
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], check=True)
        mounted = True
    try:
        if fault != "none":
            with running(launch(launcher, stage, own, work), folder) as processes:
                deadline = time.monotonic() + 180
                while fault != "disk full" and not under_way(stage, folder):
                    assert time.monotonic() < deadline and processes[0].poll() is None, last_line(folder)
                    time.sleep(0.002)
                everyone, began = family(processes), time.monotonic()
                strike(fault, processes)
                codes = finish(processes)
                psutil.wait_procs(everyone, timeout=60)  # a launcher may go before its ranks
                after = time.monotonic() - began
            ended = f"exit {' and '.join(map(str, sorted(set(codes))))}: {last_line(folder)}"
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        began = time.monotonic()
        with running(launch(launcher, stage, own, work), folder) as processes:
            codes = finish(processes)
        seconds = time.monotonic() - began
        same = "no artifact" if whole is None else "identical" if files(folder) == whole else "DIFFERENT"
        outcome = same if not any(codes) else f"exit {codes} {last_line(folder)}"
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)
    told = "-" if fault == "none" else f"{after:.1f}"
    return f"| {launcher} | {stage} | {fault} | {ended} | {told} | {seconds:.1f} | {outcome} |"


def under_way(stage: str, folder: Path) -> bool:
    """In the middle of the work."""
    if stage == "quantize":
        return done(folder) == 1
    if stage == "calibrate":
        return any("calibration_batch" in record for record in metrics(folder))
    return (folder / "metrics.jsonl").exists()


def files(folder: Path) -> dict[str, str]:
    found = artifact_files(folder)
    return {
        renamed(name): value
        for name, value in found.items()
        if name != "lowbit.json" and not name.startswith(("calibrate.", "evaluate.", "generate.", "benchmark."))
    }


LAUNCHERS = ["alone", "torchrun static", "torchrun c10d", "deepspeed", "deepspeed hostfile", "srun", "mpirun"]
FAULTS = ["USR1 to one rank", "TERM to all", "SIGKILL of rank 1"]
CASES = [(launcher, "quantize", "none") for launcher in LAUNCHERS]
CASES += [
    (launcher, "quantize", f) for launcher in ("alone", "torchrun c10d", "deepspeed", "srun", "mpirun") for f in FAULTS
]
CASES += [(launcher, "quantize", "TERM to the launcher") for launcher in ("torchrun c10d", "deepspeed", "mpirun")]
CASES += [("mpirun", "quantize", "USR1 to the launcher")]
CASES += [
    ("alone", "quantize", "SIGKILL of rank 0"),
    ("alone", "quantize", "disk full"),
    ("srun", "quantize", "disk full"),
]
CASES += [(launcher, stage, "none") for stage in ("calibrate", "evaluate", "generate") for launcher in LAUNCHERS[2:]]
CASES += [(launcher, stage, "none") for stage in ("benchmark", "demo", "parity") for launcher in LAUNCHERS[1:]]
CASES += [("srun", "calibrate", fault) for fault in FAULTS]
CASES += [("alone", "evaluate", "USR1 to one rank"), ("torchrun c10d", "evaluate", "TERM to all")]


def main() -> None:
    words = sys.argv[1:]
    chosen = [case for case in CASES if all(word in " ".join(case) for word in words)]
    print(
        "| launcher | stage | fault | the command ended with | after (s) | run again (s) | artifacts |\n|" + "---|" * 7
    )
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = save_model("llama", work / "model", num_hidden_layers=3)
        arguments = {"quantize": [*quantize(model, work)[1:-1], "tp=2", "calibration.samples=8"]}
        shared = [f"model={embedded_folder()}", *TEXT]
        arguments["calibrate"] = [*shared[:-6], *TEXT[:3], TEXT[6], "engine=deepspeed", "tp=2", "comm.tp_sizes=[2]"]
        arguments["evaluate"] = [*shared, "engine=deepspeed", "tp=2"]
        arguments["generate"] = [shared[0], "engine=deepspeed", "tp=2", "max_new_tokens=4"]
        arguments["benchmark"] = ["tp=2", "repeats=2", "tokens=64", *TEXT[:1], "calibration.samples=4"]
        arguments["demo"] = ["tp=2", *TEXT, "max_new_tokens=4"]
        arguments["parity"] = ["model=embedded", "artifact=none", "prompts=none"]  # it refuses first
        wholes: dict[str, dict[str, str] | None] = dict.fromkeys(
            ["evaluate", "generate", "benchmark", "demo", "parity"]
        )
        if shutil.which("mpirun") is None:
            chosen = [case for case in chosen if case[0] != "mpirun"]
        for launcher, stage, fault in chosen:
            if stage not in wholes:
                folder, alone = work / f"whole-{stage}", list(arguments[stage])
                if stage == "quantize":
                    alone.remove("tp=2")  # one process
                with running(launch("alone", stage, [*alone, f"output_dir={folder}"], work), folder) as processes:
                    assert finish(processes) == [0], last_line(folder)
                wholes[stage] = files(folder)
            print(row(launcher, stage, fault, arguments[stage], wholes[stage], work), flush=True)


if __name__ == "__main__":
    main()
