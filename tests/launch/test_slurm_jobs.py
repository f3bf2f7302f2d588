"""Stages as jobs of a real Slurm (slurm_lab.py) on two nodes each, and what befalls jobs: a signal, a lost node, a
killed rank, a full disk, a bad config. All are submitted by `slurm submit`; faults come in the middle, as seen in the
state that the run has saved. What is compared are sha256 of all files of the artifact.

Each case records what happened and how long it took, in a table that `pytest -s` shows at the end.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from commands import CALIBRATION, EVALUATION, needs_deepspeed, run_here
from megatron_scripts import ON_CPU, PROMPTS, continued, find_script, generated, real
from read_wandb import read_file, wandb_files
from slurm_lab import SlurmLab, why_not
from tiny_models import save_model
from unfinished_runs import SETTINGS, artifact_files, done, metrics

from megatron_lowbit.adapters import megatron_script_on_cpu

pytestmark = [needs_deepspeed, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]
pytestmark += [pytest.mark.slow, pytest.mark.xdist_group("slurm")]  # on one Slurm, one after the other
BLOCKS = 5  # in groups of one: states enough to be caught between two


@pytest.fixture(scope="module")
def lab() -> Iterator[SlurmLab]:
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        lab = SlurmLab(Path(folder))
        try:
            lab.start()
            yield lab
        finally:
            lab.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> dict[str, str]:
    """{file: sha256} of a run that nothing disturbed, of one process without Slurm."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_here("quantize", f"model={model}", *SETTINGS, f"output_dir={folder}") == 0
    return artifact_files(folder)


@pytest.fixture(scope="module")
def record() -> Iterator[Callable[..., None]]:
    rows = [
        "| launcher | stage | fault | what happened | seconds to recover | artifact |",
        "|---|---|---|---|---:|---|",
    ]
    yield lambda *cells: rows.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    print("", *rows, sep="\n")


class Jobs:
    """The stages of one `slurm submit`."""

    def __init__(self, lab: SlurmLab, folder: Path, stages: dict, **keys: object):
        self.lab, self.folder = lab, folder
        config = {
            "stages": stages,
            "nodes": 2,
            "time": "10",
            "python": sys.executable,
            "setup": ["export MASTER_ADDR=127.0.0.1"],  # nobody resolves the names of the nodes
            "wait": 20,
            "options": ["--exclude=node[3-4]"],
            "output_dir": str(folder / "slurm"),
            **keys,
        }
        folder.mkdir(exist_ok=True)
        (folder / "jobs.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        self.ids: dict[str, str] = {}

    def submit(self) -> Jobs:
        printed = io.StringIO()
        with patch.dict(os.environ, self.lab.environ, clear=True), contextlib.redirect_stdout(printed):
            assert run_here("slurm", "submit", self.folder / "jobs.yaml") == 0
        words = [line.split() for line in printed.getvalue().splitlines() if not line.startswith("wrote ")]
        self.ids = dict(words)
        return self

    def ended(self, stage: str = "quantize") -> tuple[str, str]:
        """(state, exit code) of a stage's job once it has ended; its log is shown where a test then fails."""
        job = self.lab.ended(self.ids[stage])
        print(f"--- {self.folder.name} {stage}: {job['JobState']} {job['ExitCode']}\n{self.log(stage)}")
        return job["JobState"], job["ExitCode"].partition(":")[0]

    def restarts(self, stage: str = "quantize") -> int:
        return int(self.lab.job(self.ids[stage])["Restarts"])

    def recovered(self, output: Path, fault: float) -> str:
        """Seconds from the fault to the first step of the job's second start."""
        (start,) = re.findall(r"start 2, (\S+)", self.log())
        again = datetime.fromisoformat(start).timestamp()
        return f"{min(r['time'] for r in metrics(output) if r.get('time', 0) > again) - fault:.1f}"

    def log(self, stage: str = "quantize") -> str:
        (file, *_) = [*(self.folder / "slurm" / "logs").glob(f"*-{self.ids[stage]}.log"), None]
        return file.read_text() if file else ""

    def pids(self, rank: int) -> list[int]:
        """Processes of a rank: those that hold its number and this job's in their environment."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            wanted = {f"SLURM_JOB_ID={self.ids['quantize']}".encode(), f"SLURM_PROCID={rank}".encode()}
            if wanted <= set(variables) and b"megatron_lowbit.launch.quantize" in command:
                found.append(int(entry.name))
        return found

    def wait_for_group(self, output: Path, least: int = 1) -> None:
        self.lab.wait(lambda: (done(output) or 0) >= least, 240, f"state of {least} groups in {output}\n{self.log()}")


def quantize(model: Path, output: Path, *more: str) -> dict:
    return {"arguments": [f"model={model}", *SETTINGS, f"output_dir={output}", *more]}


@pytest.fixture(scope="module")
def chain(lab, model, tmp_path_factory) -> Jobs:
    """calibrate -> quantize -> evaluate, each by another launcher."""
    folder = tmp_path_factory.mktemp("chain")
    two_ranks = [f"model={model}", "engine=deepspeed", "tp=2"]
    calibrate = [*two_ranks, *CALIBRATION, "comm.tp_sizes=[2]", f"output_dir={folder / 'plans'}"]
    evaluate = [*two_ranks, f"artifact={folder / 'artifact'}", *EVALUATION, f"output_dir={folder / 'evaluation'}"]
    stages = {
        "calibrate": {"arguments": calibrate, "launcher": "deepspeed"},
        "quantize": quantize(model, folder / "artifact", "tp=2"),
        "evaluate": {"arguments": evaluate, "launcher": "torchrun"},
    }
    jobs = Jobs(lab, folder, stages).submit()
    assert lab.state(jobs.ids["quantize"]) == lab.state(jobs.ids["evaluate"]) == "PENDING"
    return jobs


@pytest.mark.parametrize(
    "launchers",
    [{"srun": "offline"}, {"torchrun": "off", "deepspeed": "off"}],
    ids=" ".join,
)
def test_jobs_that_have_to_make_way(lab, model, whole, tmp_path, record, launchers):
    """USR1, as Slurm sends it before the time is up: the state is saved, the job goes back into the queue and on."""
    running, faults = {}, {}
    for launcher, wandb in launchers.items():
        stage = {**quantize(model, tmp_path / launcher / "artifact", "tp=2", f"wandb={wandb}"), "launcher": launcher}
        running[launcher] = Jobs(lab, tmp_path / launcher, {"quantize": stage}).submit()
    for launcher, jobs in running.items():
        jobs.wait_for_group(tmp_path / launcher / "artifact")
        faults[launcher] = time.time()
        lab.run("scancel", "--signal=USR1", jobs.ids["quantize"])
    for launcher, jobs in running.items():
        output = tmp_path / launcher / "artifact"
        assert jobs.ended() == ("COMPLETED", "0")
        assert jobs.restarts() == 1 and "goes back into the queue" in jobs.log() and "Traceback" not in jobs.log()
        (at,) = re.findall(r"^continuing after (\d+) of", jobs.log(), flags=re.M)
        assert artifact_files(output) == whole
        if launcher == "srun":
            check_history(output)
        what, seconds = f"USR1, {at} of {BLOCKS} groups done", jobs.recovered(output, faults[launcher])
        record(launcher, "quantize", what, "exit 99, requeued, went on", seconds, "identical")


def check_history(output: Path) -> None:
    """Both .wandb files are of one run, and merged they have every step of metrics.jsonl once and in order."""
    if find_spec("wandb") is None:
        return
    first, second = wandb_files(output)
    runs = [read_file(first), read_file(second)]
    assert runs[0].run_id == runs[1].run_id and all(run.history for run in runs)
    steps = [entry["step"] for run in runs for entry in run.history]
    assert steps == list(range(len(steps))) == [r["step"] for r in metrics(output) if "step" in r]


def test_a_node_that_goes_down(lab, model, whole, tmp_path, record):
    """The job runs on two nodes where no other test's jobs do."""
    output, nodes = tmp_path / "artifact", ["--exclude=node[1-2]"]
    jobs = Jobs(lab, tmp_path, {"quantize": quantize(model, output, "tp=2")}, options=nodes).submit()
    jobs.wait_for_group(output)
    fault = time.time()
    lab.run("scontrol", "update", "nodename=node4", "state=down", "reason=test")
    try:
        lab.wait(lambda: jobs.restarts() == 1, 60, f"requeue\n{jobs.log()}")
        at = done(output)
        assert at is not None and 1 <= at < BLOCKS, "it came too late"
    finally:
        lab.run("scontrol", "update", "nodename=node4", "state=resume", check=False)  # it may be up by itself
    assert jobs.ended() == ("COMPLETED", "0")
    assert artifact_files(output) == whole
    what, seconds = f"a node down, {at} of {BLOCKS} groups done", jobs.recovered(output, fault)
    record("srun", "quantize", what, "requeued by Slurm, went on", seconds, "identical")


def test_a_rank_that_is_killed(lab, model, whole, tmp_path, record):
    """The job fails, what waits for it is cancelled, and the same submission goes on."""
    output = tmp_path / "artifact"
    evaluate = {"arguments": [f"model={model}", f"artifact={output}", *EVALUATION], "nodes": 1}
    jobs = Jobs(lab, tmp_path, {"quantize": quantize(model, output, "tp=2"), "evaluate": evaluate}).submit()
    jobs.wait_for_group(output)
    (victim,) = jobs.pids(rank=1)
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    state, _ = jobs.ended()
    seconds = f"{time.monotonic() - start:.1f} to fail"
    assert state == "FAILED" and jobs.ended("evaluate")[0] == "CANCELLED"
    assert "Killed" in jobs.log(), jobs.log()
    assert 1 <= (done(output) or 0) < BLOCKS
    again = Jobs(lab, tmp_path, {"quantize": quantize(model, output, "tp=2")}).submit()
    assert again.ended() == ("COMPLETED", "0")
    assert artifact_files(output) == whole
    what = "job failed, evaluate cancelled; submitted again it went on"
    record("srun", "quantize → evaluate", "SIGKILL of rank 1", what, seconds, "identical")


def test_a_full_disk(lab, model, whole, tmp_path, record):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        jobs = Jobs(lab, tmp_path, {"quantize": quantize(model, disk / "artifact")}, nodes=1).submit()
        assert jobs.ended() == ("FAILED", "2")
        (line,) = [line for line in jobs.log().splitlines() if line.startswith("megatron-lowbit: ")]
        assert "No space left on device" in line and "Traceback" not in jobs.log()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert jobs.submit().ended() == ("COMPLETED", "0") and "continuing after" in jobs.log()
        assert artifact_files(disk / "artifact") == whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    record("srun", "quantize", "disk full", "exit 2 with one line; submitted again it went on", "-", "identical")


def test_bad_config_in_the_second_stage(lab, model, tmp_path, record):
    stages = {
        "calibrate": {"arguments": [f"model={model}", *CALIBRATION, f"output_dir={tmp_path / 'plans'}"]},
        "quantize": quantize(tmp_path / "nothing", tmp_path / "artifact"),
        "evaluate": {"arguments": [f"model={model}", *EVALUATION, f"output_dir={tmp_path / 'evaluation'}"]},
    }
    jobs = Jobs(lab, tmp_path, stages, nodes=1).submit()
    assert jobs.ended("quantize") == ("FAILED", "2")
    assert jobs.ended("evaluate")[0] == "CANCELLED"
    (line,) = [line for line in jobs.log().splitlines() if line.startswith("megatron-lowbit: ")]
    assert "nothing" in line and lab.state(jobs.ids["calibrate"]) == "COMPLETED"
    assert not (tmp_path / "evaluation").exists()
    what = "exit 2 with one line, evaluate cancelled"
    record("srun", "calibrate → quantize → evaluate", "no such model in quantize", what, "-", "-")


def test_chain(chain, whole, record):
    stages = list(chain.ids)
    assert {stage: chain.ended(stage) for stage in stages} == dict.fromkeys(stages, ("COMPLETED", "0"))
    assert (chain.folder / "plans" / "comm_plan_tp2.json").exists()
    assert artifact_files(chain.folder / "artifact") == whole
    rows = {row["name"]: row for row in json.loads((chain.folder / "evaluation" / "evaluate.json").read_text())["rows"]}
    assert {row["tp"] for row in rows.values()} == {2} and len(rows) > 1
    record("deepspeed, srun, torchrun", " → ".join(stages), "none", "completed", "-", "identical")


SCRIPT = """
import os, pathlib, sys
rank = "-".join(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
folder = pathlib.Path(sys.argv[1])
(folder / rank).write_text(os.environ["MEGATRON_LOWBIT_ARTIFACT"] + " " + " ".join(sys.argv[2:4]))
"""


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_script_of_ones_own(lab, tmp_path, launcher):
    """A script that no command of ours is in learns its rank on two nodes, and the artifact from the environment."""
    (tmp_path / "pretrain.py").write_text(SCRIPT)
    (tmp_path / "ranks").mkdir()
    arguments = [str(tmp_path / "ranks"), "--spec", "two words"]
    job = {"script": str(tmp_path / "pretrain.py"), "arguments": arguments, "launcher": launcher}
    setup = ["export MASTER_ADDR=127.0.0.1", "export MEGATRON_LOWBIT_ARTIFACT=some/folder"]
    jobs = Jobs(lab, tmp_path / "jobs", {"train": job}, setup=setup).submit()
    assert jobs.ended("train") == ("COMPLETED", "0")
    found = {file.name: file.read_text() for file in (tmp_path / "ranks").iterdir()}
    assert found == dict.fromkeys(["0-2-0", "1-2-0"], "some/folder --spec two words")


class TestMegatronLm:
    pytestmark = real

    @pytest.mark.parametrize(
        ("tp", "pp", "dtype"), [(1, 2, torch.float32), (2, 1, torch.bfloat16), (2, 2, torch.bfloat16)]
    )
    def test_an_inference_script(self, lab, embedded_artifact, tmp_path, tp, pp, dtype):
        """configs/slurm/megatron_lm.yaml on two nodes, each a pipeline stage, a tensor-parallel rank, or a stage of two
        ranks: tokens of transformers."""
        template = Path(__file__).resolve().parents[2] / "configs" / "slurm" / "megatron_lm.yaml"
        (stage,) = yaml.safe_load(template.read_text())["stages"].values()
        script = find_script(Path(stage["script"]).name)
        assert (
            script is not None and run_here("convert", f"artifact={embedded_artifact}", f"output_dir={tmp_path}") == 0
        )
        words, folder = stage["arguments"], str(tmp_path / "megatron")
        for option, value in {
            "--load": folder,
            "--tokenizer-model": folder,
            "--tensor-model-parallel-size": str(tp),
            "--pipeline-model-parallel-size": str(pp),
            "--prompts": PROMPTS[0],
            "--output-path": str(tmp_path / "text.json"),
        }.items():
            words[words.index(option) + 1] = value
        if dtype is torch.float32:
            words.remove("--bf16")
        words += [*ON_CPU.split(), "--top_k", "1", "--num-tokens-to-generate", "16", "--inference-max-seq-length", "64"]
        job = {"script": megatron_script_on_cpu.__file__, "arguments": [str(script), *words], "launcher": "torchrun"}
        jobs = Jobs(lab, tmp_path / "jobs", {"inference": job}, tasks_per_node=tp * pp // 2).submit()
        assert jobs.ended("inference") == ("COMPLETED", "0")
        expected = continued(embedded_artifact, tp, dtype=dtype)
        assert generated(tmp_path / "text.json") == {PROMPTS[0]: expected[PROMPTS[0]]}
