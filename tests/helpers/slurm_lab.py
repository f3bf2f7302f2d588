"""A Slurm of the tests' own: a controller and four nodes on this machine, in a private folder and on private ports.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge; neither systemd, cgroups, /etc/slurm nor /etc/munge.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from ports import free_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "munge", "sbatch", "srun", "scontrol")
PATH = f"{os.environ['PATH']}:/usr/sbin"
NODES = ("node1", "node2", "node3", "node4")
CPUS = 8  # of each node, as Slurm believes: more jobs run side by side than the machine has cores
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


def why_not() -> str | None:
    """Why no Slurm can run here, if so."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"needs {', '.join(missing)}: `make slurm-packages` as root installs them"
    return None if os.getuid() == 0 else "slurmctld and slurmd of the tests run as root"


class SlurmLab:
    """`folder` must have a short path: it holds sockets."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environ = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [name for name in self.environ if name.startswith(("SBATCH_", "SLURM_")) and name != "SLURM_CONF"]:
            del self.environ[name]  # of a job that pytest itself may run in
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("state", "spool", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key, socket_file = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (self.folder / "slurm.conf").write_text(self._conf())
        munge = [f"--{name}={self.folder}/munge.{end}" for name, end in (("pid-file", "pid"), ("seed-file", "seed"))]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_file}", *munge)
        self.wait(socket_file.exists, 20, "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self.wait(lambda: self.run("sinfo", "-h", "-N", "-o", "%t", check=False).split() == ["idle"] * 4, 60, "nodes")

    def stop(self) -> None:
        """Cancel all jobs, then end the daemons that this object started."""
        with contextlib.suppress(Exception):
            self.run("scancel", "--user=root")
            self.wait(lambda: not self.run("squeue", "-h").strip(), 20, "the end of all jobs")
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _daemon(self, name: str, *arguments: str) -> None:
        with open(self.folder / f"{name}-{len(self.daemons)}.log", "wb") as log:
            command = [shutil.which(name, path=PATH) or name, *arguments]
            daemon = subprocess.Popen(command, env=self.environ, stdout=log, stderr=log, start_new_session=True)
        self.daemons.append(daemon)

    def _conf(self) -> str:
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={CPUS} "
            f"CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN"
            for node in NODES
        )
        return f"""
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its old credential to expire: two minutes by default, and where less than 5 s is asked.
AuthInfo=socket={self.folder}/munge.socket,cred_expire=5
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
MailProg=/bin/true
PropagateResourceLimits=NONE
{nodes}
PartitionName=tests Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP
"""

    def run(self, *command: object, check: bool = True) -> str:
        """Standard output of a client's command."""
        done = subprocess.run(
            [str(word) for word in command], env=self.environ, capture_output=True, text=True, timeout=300
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts, Reason..."""
        shown = self.run("scontrol", "-o", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def ended(self, number: str, timeout: float = 240) -> dict[str, str]:
        self.wait(lambda: self.state(number) in ENDED, timeout, f"the end of job {number}")
        return self.job(number)

    def wait(self, ready: Callable[[], object], timeout: float, what: str) -> float:
        """Seconds until ready(); fails after `timeout` with the ends of the daemons' logs."""
        start = time.monotonic()
        while not ready():
            if time.monotonic() - start > timeout:
                logs = [f"{log.name}: {log.read_text(errors='replace')[-600:]}" for log in self.folder.glob("*.log")]
                raise AssertionError(f"no {what} within {timeout} s\n" + "\n".join(logs))
            time.sleep(0.1)
        return time.monotonic() - start
