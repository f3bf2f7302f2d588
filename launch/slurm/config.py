"""What `megatron-lowbit slurm` is told about a cluster and the stages to run there (configs/slurm/*.yaml)."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Launcher = Literal["srun", "torchrun", "deepspeed"]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _without_line_breaks(cls, value: Any) -> Any:
        texts = value if isinstance(value, tuple) else (value,)
        if any("\n" in text for text in texts if isinstance(text, str)):
            raise ValueError("write one line, without a line break")
        return value


class ContainerConfig(_Config):
    """The image that the stages run in."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    """what starts the container: pyxis: srun --container-image; apptainer: apptainer exec"""
    image: str | None = None
    """a .sqsh or .sif file, or a registry's name of an image"""
    mounts: tuple[str, ...] = ()
    """folders to mount, each as FROM:TO, beside the working directory, which is always there"""

    @model_validator(mode="after")
    def _has_an_image(self) -> ContainerConfig:
        if (self.runtime == "none") != (self.image is None):
            raise ValueError("container.runtime and container.image need each other")
        return self


class Resources(_Config):
    """The resources of one stage, or of all that do not say otherwise."""

    nodes: int | None = Field(None, ge=1)
    """nodes of a job"""
    tasks_per_node: int | None = Field(None, ge=1)
    """ranks on each: nodes x tasks_per_node must be the stage's tp x pp x dp"""
    gpus_per_node: int | None = Field(None, ge=0)
    """GPUs on each node; 0: none are asked for"""
    cpus_per_task: int | None = Field(None, ge=1)
    """cores of a rank"""
    time: str | None = None
    """time limit, such as "04:00:00"; a stage that needs longer makes way in time and goes on in the requeued job"""
    launcher: Launcher | None = None
    """srun: a task per rank; torchrun, deepspeed: a task per node, which starts the node's ranks"""

    @field_validator("time", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML 1.1 reads 04:00:00 as a number, 14400
            raise ValueError('write the time in quotes, such as "04:00:00"')
        if value is not None and not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", str(value)):
            raise ValueError("give minutes, hours:minutes:seconds or days-hours, such as 04:00:00")
        return value


class StageJob(Resources):
    """One stage as a job; a resource that is none is what all stages have."""

    command: str | None = None
    """stage of megatron-lowbit; none: the entry's own name"""
    script: str | None = None
    """a Python script instead of a stage, such as Megatron-LM's pretrain_gpt.py or your own for DeepSpeed; it takes the
    entry's arguments alone, and launcher=torchrun or deepspeed tells it its rank"""
    arguments: tuple[str, ...] = ()
    """as on the command line: --config FILE (beside the pipeline file, or else in the working folder),
    key.path=value"""
    array: tuple[tuple[str, ...], ...] = ()
    """a job array: further arguments, one list per task; the next stage's task i follows task i if it has as many"""

    @model_validator(mode="after")
    def _is_one_thing(self) -> StageJob:
        if self.script is not None and self.command is not None:
            raise ValueError(f"command={self.command} and script={self.script} are two things to run; give one")
        return self


class SlurmConfig(Resources):
    """A pipeline of stages, the resources of all and the cluster's own ways."""

    stages: dict[str, StageJob] = {}
    """{NAME: job} in the order they run; each starts when the one before has succeeded"""
    arguments: tuple[str, ...] = ()
    """arguments of every stage, before its own; not of scripts"""
    job_name: str = Field("lowbit", pattern=r"^[\w.+-]+$")
    """jobs are named job_name-stage"""
    partition: str | None = None
    """partition of the jobs; none: the cluster's default"""
    account: str | None = None
    """account of the jobs; none: the user's default"""
    options: tuple[str, ...] = ()
    """further options of sbatch, such as --qos=long or --constraint=a100"""
    setup: tuple[str, ...] = ()
    """lines of bash before the stage starts: module load ..., source .venv/bin/activate, export
    NCCL_SOCKET_IFNAME=..."""
    container: ContainerConfig = ContainerConfig()
    python: str = Field("python", pattern=r"^[\w./+-]+$")
    """interpreter, as `setup` or the container provides it"""
    nodes: int = Field(1, ge=1)
    tasks_per_node: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0)
    cpus_per_task: int = Field(1, ge=1)
    launcher: Launcher = "srun"
    notice: int = Field(120, ge=1, le=65535)
    """seconds before the time limit at which the stage is told to save and make way"""
    wait: int = Field(60, ge=1)
    """seconds that other ranks are given after one has ended"""
    output_dir: str = "runs/slurm"
    """folder of the scripts and of the jobs' logs"""
    template: str | None = None
    """an sbatch template of your own instead of slurm/stage.sbatch"""
    variables: dict[str, str] = {}
    """{name: text} of further {{name}} in the template"""

    @model_validator(mode="after")
    def _has_stages(self) -> SlurmConfig:
        for name, stage in self.stages.items():
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"stages: {name!r} names a file and a job: use letters, digits, - and _")
            if any("{{" in text for text in (*stage.arguments, *self.arguments)):
                raise ValueError(f"stages.{name}: an argument holds '{{{{', which templates use")
        return self
