"""Kills every command and runs it again: python tests/helpers/kill_matrix.py [KILLS] [SEED], a line per command.

A command is killed by SIGKILL, SIGTERM or SIGINT, at a random moment or right before one of the calls that change a
folder. The same command, run again, has to end with the results and artifacts of a run that nobody disturbed, and to
leave nothing else: no temporary file, no lock, no state, nothing in the machine's temporary folder, no process.
Commands of one process are forks of this one, which has imported everything, so that a kill costs seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONSAFEPATH": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from commands import CALIBRATION, EVALUATION
from forked import Forked, forked
from tiny_models import save_model

from megatron_lowbit.launch import main
from megatron_lowbit.runtime import preemption

POINTS = ("replace", "unlink", "rename", "link", "mkdir", "rmdir", "posix_fallocate")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# benchmark collectives, which has nothing to continue, ends with 143.
ENDS = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {99, 143},
    signal.SIGINT: {130},
}  # 143: benchmark collectives
QLLM = [*CALIBRATION, "weights.scheme=W4A4", "reassembly.expansions=[0.05]", "correction.blocks_per_group=1"]
QLLM += ["correction.epochs=1", "comm.tp_sizes=[2]"]
TIMES = ("seconds", "_per_second", "latency", "repetitions", "bytes_per_s", "peak_bytes", "ratio", "speed", "share")
PATIENCE = 300.0  # seconds after which a command hangs


def commands(model: Path, artifact: Path) -> dict[str, list[str]]:
    """{name: command line without output_dir}: those of one process first."""
    of, made = f"model={model}", f"artifact={artifact}"
    prompts = artifact.parent / "prompts.txt"
    prompts.write_text("def f(x):\nimport os\n")
    return {
        "calibrate": ["calibrate", of, *CALIBRATION, "comm.tp_sizes=[2]"],
        "quantize rtn": ["quantize", of, "weights.scheme=W4A8"],
        "quantize qllm": ["quantize", of, *QLLM],
        "evaluate": ["evaluate", of, made, "virtual_tp=2", *EVALUATION],
        "generate": ["generate", of, made, "max_new_tokens=8", f"prompts={prompts}"],
        "benchmark kernels": ["benchmark", "kernels", "tokens=8", "features=64", "compile=false"],
        "quantize qllm tp=2": ["quantize", of, *QLLM, "tp=2"],
        "benchmark collectives": ["benchmark", "collectives", "ranks=2", "sizes=64KiB", "cell_seconds=0.1"],
        "parity": ["parity", of, made, f"prompts={prompts}", "engines=[huggingface]", "tp_sizes=[1]"],
    }


OF_ONE_PROCESS = ("calibrate", "quantize rtn", "quantize qllm", "evaluate", "generate", "benchmark kernels")
OF_SEVERAL_PROCESSES = ("quantize qllm tp=2", "benchmark collectives", "parity")


@dataclass
class Whole:
    """A run that nobody disturbed."""

    results: dict[str, object]
    seconds: float
    points: int


@dataclass
class Tally:
    kills: int = 0
    finished_first: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def results(folder: Path) -> dict[str, object]:
    """What a command leaves: digests of the artifact's files, and the rows of its JSON without times."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.name == "metrics.jsonl" or path.suffix in (".yaml", ".png", ".html"):
            continue
        if path.suffix == ".json" and "environment" in (value := json.loads(path.read_text())):
            found[name] = timeless({key: value[key] for key in value if key not in ("environment", "config")})
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def timeless(value: object) -> object:
    if isinstance(value, list):
        return [timeless(item) for item in value]
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(part in k for part in TIMES)}
    return value


def watched(strike: Callable[[], None], at: int | None) -> Callable[[], int]:
    """Count the calls of POINTS from now on, and strike right before call `at`; returns what tells the count."""
    count = 0

    def around(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == at:
                strike()
            return real(*args, **kwargs)

        return call

    for name in POINTS:
        setattr(os, name, around(getattr(os, name)))
    return lambda: count


def undisturbed(command: list[str], folder: Path) -> Whole:
    def run() -> int:
        count = watched(lambda: None, None)
        code = main(command)
        print(f"\npoints {count()}")
        return code

    began = time.monotonic()
    with forked(run, TMPDIR=machine(folder)) as child:
        code, said = child.finish(PATIENCE)
    assert code == 0, said
    seconds = time.monotonic() - began
    return Whole(results(folder), seconds, int(said.rpartition("points ")[2]))


def machine(folder: Path) -> Path:
    """In place of the machine's temporary folder."""
    place = folder.parent / f"{folder.name}-tmp"
    place.mkdir(exist_ok=True)
    return place


def kill_and_run_again(
    name: str, command: list[str], whole: Whole, folder: Path, number: signal.Signals, chance: random.Random
) -> str:
    """What was wrong, or nothing; the first line of the answer says how the killed run ended."""
    at_point = chance.random() < 0.5 and name not in OF_SEVERAL_PROCESSES
    point = chance.randint(1, max(whole.points, 1)) if at_point else None
    moment = chance.uniform(0, whole.seconds)

    def run() -> int:
        preemption.install()  # as importing the command does; `main` alone would put the handlers back as it returns
        tempfile.tempdir = None
        watched(lambda: os.kill(os.getpid(), number), point)
        return main(command)

    how = f"{number.name} " + (f"before call {point}" if at_point else f"after {moment:.2f} s")
    signal.pthread_sigmask(signal.SIG_BLOCK, preemption.HELD_BACK)  # until the child has handlers
    with forked(run, TMPDIR=machine(folder)) as child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, preemption.HELD_BACK)
        if not at_point:
            threading.Timer(moment, child.send_signal, [number]).start()
        code, said = child.finish(PATIENCE)
        time.sleep(0.2)  # for what dies with it
        faults = list(left_running(child))
    if code not in {0, *ENDS[number]}:
        faults.append(f"ended with {code}: {said[-300:]}")
    if "Traceback" in said:
        faults.append(f"a traceback: {said[-2000:]}")
    began = time.monotonic()
    while True:
        with forked(lambda: again(command), TMPDIR=machine(folder)) as child:
            second, said = child.finish(PATIENCE)
            faults += left_running(child)
        if second != 2 or "belongs to process" not in said or time.monotonic() - began > PATIENCE:
            break
        time.sleep(0.5)
    if second:
        faults.append(f"run again, it ended with {second}: {said[-600:]}")
    elif (found := results(folder)) != whole.results:
        unlike = {key for key in found.keys() | whole.results.keys() if found.get(key) != whole.results.get(key)}
        faults.append(f"other results: {sorted(unlike)}")
    left = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith(".") or p.name == "resume"]
    left += [path.name for path in machine(folder).iterdir() if not ignored(path.name)]
    if left:
        faults.append(f"left behind: {left}")
    return "\n".join([str(code), *(f"{name}, {how}: {fault}" for fault in faults)])


def again(command: list[str]) -> int:
    tempfile.tempdir = None
    return main(command)


def ignored(name: str) -> bool:
    """What other packages keep there on purpose, and how torch and Python's multiprocessing name what they clean up."""
    return name.startswith(("torchinductor_", "pymp-", "megatron_lowbit-"))


def left_running(child: Forked) -> Iterator[str]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == child.pid and state not in "ZX":
            yield f"process {stat.parent.name} still runs"


def campaign(names: list[str], kills: int, seed: int, work: Path, say: Callable[[str], None]) -> dict[str, Tally]:
    """kills: of all these commands together. The signals take turns."""
    torch.set_num_threads(1)
    model = save_model("llama", work / "model", num_hidden_layers=2)
    made = [
        "quantize",
        f"model={model}",
        "weights.scheme=W4A8",
        *CALIBRATION,
        "weights.method=rtn",
        "comm.tp_sizes=[2]",
    ]
    assert main([*made, f"output_dir={work / 'artifact'}"]) == 0
    everything = commands(model, work / "artifact")
    tallies: dict[str, Tally] = {}
    for name in names:
        whole = undisturbed([*everything[name], f"output_dir={work / 'whole'}"], work / "whole")
        tally = tallies[name] = Tally()
        chance = random.Random(f"{seed} {name}")
        for number in range(-(-kills // len(names))):
            folder = work / f"killed-{number}"
            command = [*everything[name], f"output_dir={folder}"]
            ending = SIGNALS[number % len(SIGNALS)]
            code, *faults = kill_and_run_again(name, command, whole, folder, ending, chance).split("\n")
            tally.kills += 1
            tally.codes[int(code)] += 1
            tally.faults += faults
            for fault in faults:
                say(fault)
            for used in (folder, machine(folder)):
                shutil.rmtree(used, ignore_errors=True)
        shutil.rmtree(work / "whole")
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(tally.codes.items()))
        say(f"{name}: {tally.kills} kills (exit codes {codes}), {len(tally.faults)} faults")
    return tallies


if __name__ == "__main__":
    kills, seed, *chosen = [*sys.argv[1:], *["200", "0"][len(sys.argv) - 1 :]]
    with tempfile.TemporaryDirectory() as place:
        names = chosen or [*OF_ONE_PROCESS, *OF_SEVERAL_PROCESSES]
        campaign(names, int(kills), int(seed), Path(place), lambda line: print(line, flush=True))
