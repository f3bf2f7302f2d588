"""megatron-lowbit slurm render|submit FILE [key.path=value ...]: stages as jobs of a Slurm cluster.

    render   fills in slurm/stage.sbatch for every stage and slurm/chain.sh for all, in output_dir
    submit   renders, then runs chain.sh: each stage starts when the one before has succeeded

A relative --config in FILE is looked for beside FILE, then in the working folder.

Scripts are plain bash that can be read, changed and submitted by hand. A stage that Slurm tells to make way saves its
state, exits with 99, and its job goes back into the queue; so does a job whose node fails. Both go on where they were.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_lowbit.config import LowBitError, load_config, old_name, shown
from megatron_lowbit.config.errors import suggest
from megatron_lowbit.launch import STAGES
from megatron_lowbit.launch.arguments import CONFIGS, Parser, fail, parse
from megatron_lowbit.launch.ending import say_next
from megatron_lowbit.launch.layout import check_own, check_world, own_ranks
from megatron_lowbit.launch.slurm.config import SlurmConfig, StageJob

VARIABLE = re.compile(r"\{\{(\w+)\}\}")
# What each task of a job runs, in a shell that knows its node; the stage's module, or a script, and arguments follow.
LAUNCH = {
    "srun": "{python}{module}",
    "torchrun": "{python} -m megatron_lowbit.launch.torchrun --nnodes {nodes} --nproc-per-node {tasks} "
    '--node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"{module}',
    "deepspeed": '{python} -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --no_ssh --node_rank "$SLURM_NODEID" '
    '--no_local_rank --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"{module}',
}
MODULE = {"srun": " -m", "torchrun": " -m", "deepspeed": " --module"}  # before a module; a script's path needs nothing


def main(argv: list[str]) -> int:
    parser = Parser(prog="megatron-lowbit slurm", description=STAGES["slurm"], config=SlurmConfig)
    parser.add_argument("action", choices=("render", "submit"), help="write the scripts; submit: and send them")
    parser.add_argument("file", help="YAML file (examples: configs/slurm/)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    try:
        args = parser.parse_intermixed_args(argv)
        config = with_files_found(load_config(SlurmConfig, args.file, args.overrides), Path(args.file).parent)
        if args.action == "submit" and shutil.which("sbatch") is None:
            raise LowBitError("there is no sbatch on this machine; submit from a login node, or use slurm render")
        scripts = render(config)
        from megatron_lowbit.io.files import ensure_writable, write_text  # and with it torch

        folder = ensure_writable(Path(config.output_dir).absolute())
        ensure_writable(folder / "logs")
        for name, text in scripts.items():
            write_text(folder / name, text)
            print(f"wrote {folder / name}")
        if args.action == "submit":
            _submit(folder)
        else:
            say_next(["bash", str(folder / "chain.sh")])
        return 0
    except LowBitError as error:
        return fail(str(error))


def _submit(folder: Path) -> None:
    done = subprocess.run(["bash", str(folder / "chain.sh")], capture_output=True, text=True)
    if done.returncode:
        before = " ".join(done.stdout.split())
        cancelled = f"; cancelled again: {before}" if before else ""
        raise LowBitError(f"not submitted: {' '.join(done.stderr.split()) or 'chain.sh failed'}{cancelled}")
    print(done.stdout, end="")


def with_files_found(config: SlurmConfig, folder: Path) -> SlurmConfig:
    """Return the config with the template and every stage's --config file as the jobs will find them, in the working
    folder.

    A relative path is looked for beside the pipeline file (in `folder`), then in the working folder, which is said.
    Raises LowBitError for one that is in neither.
    """

    def found(name: str, what: str = "config file") -> str:
        here, file = Path.cwd(), Path(name)
        for place in (folder, here):
            path = Path(os.path.abspath(place / file))
            if os.path.isfile(path) or old_name(str(path)):  # False for a name that no system takes
                if place == here and not file.is_absolute() and here != folder.absolute():
                    print(f"{name} is not beside the pipeline file; taken from the working folder {here}")
                return str(path.relative_to(here) if path.is_relative_to(here) else path)
        if file.is_absolute():
            return name  # whoever reads it says what is wrong
        raise LowBitError(
            f"cannot read {what} {shown(name)}: it is neither in the pipeline file's folder {folder} nor in {here}"
        )

    def arguments(given: tuple[str, ...]) -> tuple[str, ...]:
        before = ("", *given)
        named = (
            found(argument) if option == "--config" else argument
            for option, argument in zip(before, given, strict=False)
        )
        return tuple(
            f"--config={found(argument.removeprefix('--config='))}" if argument.startswith("--config=") else argument
            for argument in named
        )

    stages = {
        name: job.model_copy(update={"arguments": arguments(job.arguments), "array": tuple(map(arguments, job.array))})
        for name, job in config.stages.items()
    }
    template = None if config.template is None else found(config.template, "template")
    update = {"arguments": arguments(config.arguments), "stages": stages, "template": template}
    return config.model_copy(update=update)


def render(config: SlurmConfig) -> dict[str, str]:
    """Return {file name: script}; raises LowBitError for stages that cannot run as they are, and for unset
    variables."""
    if not config.stages:
        raise LowBitError("stages is empty: name at least one, such as stages.quantize.arguments=[--config, FILE]")
    template = _template(config.template, "stage.sbatch")
    jobs = {name: _with_defaults(job, config) for name, job in config.stages.items()}
    scripts = {f"{name}.sbatch": _script(name, job, config, template) for name, job in jobs.items()}
    chain = {"output_dir": _quoted(Path(config.output_dir).absolute()), "submissions": _submissions(jobs)}
    return scripts | {"chain.sh": fill(_template(None, "chain.sh"), chain, "chain.sh")}


def fill(template: str, variables: Mapping[str, Any], name: str) -> str:
    """Return the template with every {{variable}} replaced; a line that is one empty variable is left out."""
    lines = []
    for number, line in enumerate(template.splitlines(), 1):

        def value(match: re.Match[str], number: int = number) -> str:
            found = variables.get(match[1])
            if found is None:
                raise LowBitError(f"{{{{{match[1]}}}}} in line {number} of {name} is not set; set {_key(match[1])}")
            return str(found)

        filled = VARIABLE.sub(value, line)
        if filled.strip() or not line.strip():
            lines.append(filled.rstrip())
    return "\n".join(lines) + "\n"


def _key(variable: str) -> str:
    return f"{variable}=..." if variable in SlurmConfig.model_fields else f"variables.{variable}=..."


def _template(file: str | None, name: str) -> str:
    try:
        return (Path(file) if file else resources.files("megatron_lowbit.slurm").joinpath(name)).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise LowBitError(f"cannot read template {file or name!r}: {error}") from None


def _with_defaults(job: StageJob, config: SlurmConfig) -> StageJob:
    shared = ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "time", "launcher")
    return job.model_copy(update={key: getattr(config, key) for key in shared if getattr(job, key) is None})


def _script(name: str, job: StageJob, config: SlurmConfig, template: str) -> str:
    assert job.nodes and job.tasks_per_node and job.cpus_per_task and job.launcher
    command = job.command or name
    if job.script is not None:
        title, arguments = job.script, [job.script, *job.arguments]
        if job.launcher == "srun":
            raise LowBitError(f"stages.{name}: script={job.script} needs launcher=torchrun or launcher=deepspeed")
    else:
        title, arguments = f"megatron-lowbit {command}", [f"megatron_lowbit.launch.{command}", *config.arguments]
        arguments += job.arguments
        for extra in job.array or ((),):
            _check_stage(name, command, [*config.arguments, *job.arguments, *extra], job.nodes, job.tasks_per_node)
    per_rank = job.launcher == "srun"
    folder = Path(config.output_dir).absolute()
    variables = {
        "title": f"{title}: {job.nodes} x {job.tasks_per_node} ranks, started by {job.launcher}",
        "job_name": f"{config.job_name}-{name}",
        "nodes": job.nodes,
        "cpus_per_task": job.cpus_per_task,
        "slurm_tasks": job.tasks_per_node if per_rank else 1,
        "slurm_cpus": job.cpus_per_task * (1 if per_rank else job.tasks_per_node),
        "time": job.time,
        "workdir": _quoted(Path.cwd()),
        "log": f"{_quoted(folder)}/logs/{'%x-%A_%a.log' if job.array else '%x-%j.log'}",
        "notice": config.notice,
        "options": "\n".join(f"#SBATCH {option}" for option in _options(job, config)),
        "setup": "\n".join(config.setup),
        "stage": shlex.join(arguments),
        "array": _array(job),
        "prepare": _prepare(job, folder),
        "wait": config.wait,
        "container": _container(config),
        "launch": LAUNCH[job.launcher].format(
            python=config.python,
            nodes=job.nodes,
            tasks=job.tasks_per_node,
            module=MODULE[job.launcher] if job.script is None else "",
        ),
    }
    return fill(template, {**config.variables, **variables}, config.template or "stage.sbatch")


def _check_stage(name: str, command: str, arguments: list[str], nodes: int, tasks: int) -> None:
    """Check what can be known before the job runs: the stage's keys, and its number of ranks."""
    if command not in STAGES or command == "slurm":
        stages = [stage for stage in STAGES if stage != "slurm"]
        raise LowBitError(f"stages.{name}: unknown command {command!r}{suggest(command, stages)}")
    try:
        stage_config, _ = parse(command, CONFIGS[command], arguments)
        own = own_ranks(command, stage_config)
        if own is None:
            check_world(stage_config, nodes * tasks)
        else:
            check_own(command, own, nodes * tasks)
    except LowBitError as error:
        raise LowBitError(f"stages.{name} (nodes={nodes} x tasks_per_node={tasks}): {error}") from None


def _options(job: StageJob, config: SlurmConfig) -> list[str]:
    named = {"partition": config.partition, "account": config.account, "gpus-per-node": job.gpus_per_node}
    options = [f"--{key}={value}" for key, value in named.items() if value]
    return options + ([f"--array=0-{len(job.array) - 1}"] if job.array else []) + list(config.options)


def _array(job: StageJob) -> str:
    if not job.array:
        return ""
    cases = [f"  {number}) stage+=({shlex.join(extra)}) ;;" for number, extra in enumerate(job.array)]
    return "\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"])


def _prepare(job: StageJob, folder: Path) -> str:
    """Return the lines that say where ranks meet, for launchers that do not ask Slurm; under srun the stage finds out
    by itself."""
    if job.launcher == "srun":
        return ""
    nodes = 'scontrol show hostnames "$SLURM_JOB_NODELIST"'
    lines = [
        f"MASTER_ADDR=${{MASTER_ADDR:-$({nodes} | head -n 1)}}",
        "MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}",
        "export MASTER_ADDR MASTER_PORT",
    ]
    if job.launcher == "deepspeed":
        lines += [
            f'export HOSTFILE={_quoted(folder)}/logs/hosts-"$SLURM_JOB_ID"',
            f'{nodes} | sed "s/\\$/ slots={job.tasks_per_node}/" > "$HOSTFILE"',
        ]
    return "\n".join(lines)


def _container(config: SlurmConfig) -> str:
    container, here = config.container, Path.cwd()
    mounts = [f"{here}:{here}", *container.mounts]
    if container.runtime == "pyxis":
        options = [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]
        return shlex.join([*options, f"--container-workdir={here}"]) + " "
    if container.runtime == "apptainer":
        binds = [word for mount in mounts for word in ("--bind", mount)]
        # Its own process stays beside the stage, and a USR1 is for both: it too has to ignore it.
        ignore = ["bash", "-c", 'trap "" USR1; exec "$@"', "task"]
        return (
            shlex.join([*ignore, "apptainer", "exec", "--nv", *binds, "--pwd", str(here), container.image or ""]) + " "
        )
    return ""


def _submissions(jobs: dict[str, StageJob]) -> str:
    lines, before = [], None
    for name, job in jobs.items():
        pairs = before is not None and len(job.array) == len(before.array) > 0
        after = f' --dependency={"aftercorr" if pairs else "afterok"}:"$job"' if before is not None else ""
        lines.append(f"submit {name}{after}")
        before = job
    return "\n".join(lines)


def _quoted(text: str | Path) -> str:
    return shlex.quote(str(text))
