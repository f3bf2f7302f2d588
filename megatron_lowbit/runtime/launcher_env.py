"""Where this process stands among those that a launcher started: the one place that reads the launchers' variables.

    torchrun, deepspeed     RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT      as they are; they win
    Open MPI's mpirun       OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK
    MPICH's, Intel's        PMI_RANK, PMI_SIZE, MPI_LOCALRANKID
    Slurm's srun            SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST

An inner launcher's variables lie beside those of the outer one, so the order is from the inside out: torchrun under
srun is torchrun, and mpirun, which starts its daemons by srun, is mpirun. The shell of an sbatch or salloc has SLURM_*
too but is no step, and a step of one task is not one of several ranks: there a command starts its own ranks.

`adopt` writes the first line's five variables for all of them, because torch, DeepSpeed and Megatron read those.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megatron_lowbit.config import LowBitError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FIRST_PORT, _PORTS = 12000, 20000  # below the ports that Linux gives to outgoing connections (32768 and on)
_REAL_STEPS = 0xFFFFFFF0  # above are Slurm's batch, interactive and extern "steps"


@dataclass(frozen=True)
class Launch:
    """One rank of a launched job. launcher: who said so."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int


def launched() -> bool:
    """Return whether a launcher started this process as one of several ranks (or as the only one)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def env_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def env_world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def adopt(environ: MutableMapping[str, str] | None = None) -> Launch | None:
    """Find the launch and set the five variables; None, and nothing set, for a process that stands alone.

    Raises LowBitError for variables that are incomplete, out of range or contradict each other.
    """
    environ = os.environ if environ is None else environ
    launch = find_launch(environ)
    if launch is not None:
        values = (launch.rank, launch.world_size, launch.local_rank, launch.master_addr, launch.master_port)
        environ.update(zip(NAMES, map(str, values), strict=True))
    return launch


def without_launch(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a process that is to stand alone."""
    ours = (*NAMES, "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "TORCHELASTIC_USE_AGENT_STORE")
    return {name: value for name, value in environ.items() if name not in ours}


def find_launch(environ: Mapping[str, str]) -> Launch | None:
    """Find the launch that the variables describe, and change nothing; None for a process that stands alone."""
    if environ.get("RANK"):
        return _checked("torchrun", environ, environ, *NAMES[:3])
    for launcher, names in {
        "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    }.items():
        if names[0] in environ and (launcher == "mpirun" or names[2] in environ):  # srun --mpi=pmi2 sets PMI_RANK too
            return _one_of_several(launcher, environ, *names)
    if _is_step(environ):
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        return _one_of_several("srun", environ, "SLURM_PROCID", size, "SLURM_LOCALID")
    if environ.get("WORLD_SIZE"):
        raise LowBitError(
            f"WORLD_SIZE={environ['WORLD_SIZE']} is set but no launcher's rank is: unset it to run alone, or start the "
            "ranks with srun, torchrun, deepspeed or mpirun"
        )
    return None


def _is_step(environ: Mapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID") or ""
    return "SLURM_PROCID" in environ and step.isdigit() and int(step) < _REAL_STEPS


def _one_of_several(launcher: str, environ: Mapping[str, str], *names: str) -> Launch | None:
    """Return the launch; None for the only process of its launcher."""
    size = _number(launcher, environ, names[1])
    given = environ.get("WORLD_SIZE")
    if given and given != str(size):
        raise LowBitError(f"WORLD_SIZE={given} contradicts {names[1]}={size} of {launcher}: unset WORLD_SIZE")
    if size == 1:
        return None
    rendezvous = {"MASTER_ADDR": "", "MASTER_PORT": "", **environ}
    if not rendezvous["MASTER_ADDR"]:
        rendezvous["MASTER_ADDR"] = _first_host(launcher, environ, size)
    if not rendezvous["MASTER_PORT"]:
        rendezvous["MASTER_PORT"] = str(_port(environ))
    return _checked(launcher, environ, rendezvous, *names)


def _checked(launcher: str, environ: Mapping[str, str], rendezvous: Mapping[str, str], *names: str) -> Launch:
    rank, size, local_rank = (_number(launcher, environ, name) for name in names)
    if not 0 <= rank < size or not 0 <= local_rank < size:
        listed = ", ".join(f"{name}={environ[name]}" for name in names)
        raise LowBitError(f"{listed} do not go together: ranks are 0 .. {names[1]} - 1; check the call of {launcher}")
    for name in NAMES[3:]:
        if not rendezvous.get(name):
            raise LowBitError(f"RANK={rank} is set but {name} is not; start the ranks with torchrun, or set {name} too")
    port = _number(launcher, rendezvous, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise LowBitError(f"MASTER_PORT={port} is no port; give one from 1024 to 65535")
    return Launch(launcher, rank, size, local_rank, rendezvous["MASTER_ADDR"], port)


def _number(launcher: str, environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name)
    if value is None or not re.fullmatch(r"\d{1,9}", value):
        found = "is not set" if value is None else f"is {value!r}"
        raise LowBitError(
            f"the variables of {launcher} are incomplete: {name} {found}; start the ranks with {launcher}"
        )
    return int(value)


def _first_host(launcher: str, environ: Mapping[str, str], size: int) -> str:
    """Return an address of rank 0's host that all ranks can reach."""
    local = {"mpirun": "OMPI_COMM_WORLD_LOCAL_SIZE", "mpiexec": "MPI_LOCALNRANKS"}.get(launcher)
    if (local and environ.get(local) == str(size)) or (
        launcher == "srun" and (environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES")) == "1"
    ):
        return "127.0.0.1"
    hosts = environ.get("SLURM_STEP_NODELIST") if launcher == "srun" else None
    hosts = hosts or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not hosts:
        raise LowBitError(
            f"{launcher} does not say on which host rank 0 is; set MASTER_ADDR to it (mpirun -x MASTER_ADDR=...)"
        )
    return _address(first_of(hosts))


def first_of(hosts: str) -> str:
    """Return the first name of a Slurm host list: rack[1-2]n[03-05,7],x -> rack1n03."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[([^-,\]]*)[^\]]*\]", r"\1", first[0] if first else hosts)


def _address(node: str) -> str:
    """Return a node's name, or where that does not resolve the address that Slurm has for it."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    command = ["scontrol", "--oneliner", "show", "node", node]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    if found is None:
        raise LowBitError(f"the first node's name {node!r} does not resolve here; set MASTER_ADDR to its address")
    return found[1]


def _port(environ: Mapping[str, str]) -> int:
    """Return a port that is the same on all ranks of a step, and another for other jobs and steps."""
    job = environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID")
    if job and job.isdigit() and _is_step(environ):
        step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID") or "0"
        return _FIRST_PORT + (16 * int(job) + int(step)) % _PORTS
    name = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid") or job or ""
    return _FIRST_PORT + zlib.crc32(name.encode()) % _PORTS
