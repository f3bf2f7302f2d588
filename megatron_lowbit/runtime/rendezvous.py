"""How the ranks of a launched job find each other, within a bounded time and with one line where they do not.

Rank 0 (under torchrun its agent) listens at MASTER_ADDR:MASTER_PORT. Every rank signs in there; then the first that
sees all names decides "go" and all start the process group, or one that was told to stop meanwhile decides "stop". It
is a single compare-and-set, so nobody goes on alone.

$MEGATRON_LOWBIT_RENDEZVOUS_SECONDS     how long ranks wait for the last one, and then for their connections (300)
$MEGATRON_LOWBIT_COLLECTIVE_SECONDS     how long a rank waits inside a collective; longer, a peer has failed (1800)

torch.distributed waits in C++: for hours where a peer has stopped in the middle, whatever its time-outs say, and no
signal reaches Python meanwhile. So it is called in a thread, and the main thread keeps the time. Where MASTER_ADDR is
this machine's loopback address, nothing listens on any other.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed import distributed_c10d

from megatron_lowbit.config import LowBitError, one_line
from megatron_lowbit.runtime import preemption, presence
from megatron_lowbit.runtime.distributed import device
from megatron_lowbit.runtime.launcher_env import env_rank, env_world_size
from megatron_lowbit.runtime.preemption import Preempted

LIMIT, COLLECTIVES = "MEGATRON_LOWBIT_RENDEZVOUS_SECONDS", "MEGATRON_LOWBIT_COLLECTIVE_SECONDS"
GRACE = 3.0  # seconds that the thread gets, over the limit, to find the words for it


def join() -> None:
    """Make the process group of all ranks; nothing where there is one.

    Raises LowBitError naming the ranks that did not come, and Preempted.
    """
    if dist.is_initialized():
        return
    meeting = _Meeting(env_rank(), env_world_size())
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    thread = threading.Thread(target=meeting.run, daemon=True, name="rendezvous")
    thread.start()
    began, report_at, stop_requested = time.monotonic(), presence.REPORT_AFTER, None
    while thread.is_alive():
        thread.join(0.02)
        now = time.monotonic()
        if preemption.asked() and stop_requested is None:
            stop_requested = now
        if stop_requested is not None and now - stop_requested > 2 * GRACE:
            raise Preempted("its ranks had not met yet")
        if now > meeting.deadline + GRACE:
            raise LowBitError(meeting.late())
        if now - began > report_at and thread.is_alive():
            report_at *= 2
            waits = f"rank {meeting.rank} has waited {now - began:.0f} s {meeting.waits_for()}"
            print(f"megatron-lowbit: {waits}", file=sys.stderr, flush=True)
    if meeting.error is not None:
        raise meeting.error
    presence.start(meeting.rank, meeting.size)


def limit() -> float:
    """Return the seconds that ranks wait for each other. Raises LowBitError for a setting that is no number."""
    return _seconds(LIMIT, 300)


def collective_limit() -> timedelta:
    """Return how long a collective may take. Raises LowBitError for a setting that is no number."""
    return timedelta(seconds=_seconds(COLLECTIVES, 1800))


def on_loopback(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep gloo, which else listens at the host's own address, to the loopback interface."""
    with suppress(OSError):
        for _, name in socket.if_nameindex():
            if name in ("lo", "lo0"):
                return {"GLOO_SOCKET_IFNAME": environ.get("GLOO_SOCKET_IFNAME", name)}
    return {}


def loopback(host: str) -> str | None:
    """Return the address of a host that is this machine's loopback, else None."""
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return None
    inside = all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
    return min(addresses) if addresses and inside else None


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, str(default))
    try:
        seconds = float(text)
        if not 0 < seconds < 1e6:
            raise ValueError
    except ValueError:
        raise LowBitError(f"{name}={text!r} is no number of seconds; set one such as {default:g}") from None
    return seconds


def _place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


class _Meeting:
    """The thread's work, and how far it has come."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.deadline = time.monotonic() + limit()
        self.collectives = collective_limit()
        self.missing: list[int] | None = None  # ranks that have not signed in; None before anybody could be asked
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(device())  # of this thread
            self._meet()
        except Exception as error:  # told by the main thread
            self.error = error

    def waits_for(self) -> str:
        if self.missing is None:
            return f"for an answer from rank 0 at {_place()}"
        if not self.missing:
            return f"for its connections with the other {self.size - 1} ranks"
        return f"for {_named(self.missing)} of {self.size} to come to {_place()}"

    def late(self) -> str:
        advice = f"see what the other ranks say, and their firewalls ({LIMIT} sets the time)"
        return f"rank {self.rank} has waited {limit():g} s {self.waits_for()}; {advice}"

    def _meet(self) -> None:
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"lowbit/{restart}", _store(self.rank, self.size, self.deadline))
        self._all_come(store)
        self.deadline, self.missing = time.monotonic() + limit(), []
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if loopback(os.environ["MASTER_ADDR"]):
            os.environ |= on_loopback(os.environ)
        # Groups that frameworks make take their time-out from here.
        distributed_c10d.default_pg_timeout = self.collectives
        distributed_c10d.default_pg_nccl_timeout = self.collectives
        try:
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=self.collectives
            )
        except RuntimeError as error:
            raise LowBitError(
                f"the {self.size} ranks met at {_place()} but cannot connect ({one_line(error)})"
            ) from None

    def _all_come(self, store: dist.Store) -> None:
        rank, size = self.rank, self.size
        try:
            if not preemption.asked():
                store.set(f"here/{rank}", socket.gethostname())
            everyone, look_at = [f"here/{other}" for other in range(size)], 0.0
            while not store.check(["fate"]):
                if preemption.asked():
                    store.compare_set("fate", "", "stop")
                elif store.check(everyone):
                    store.compare_set("fate", "", "go")
                elif time.monotonic() > self.deadline:
                    raise LowBitError(self._who_is_late(store, everyone))
                else:
                    if time.monotonic() > look_at:
                        self.missing = [other for other, key in enumerate(everyone) if not store.check([key])]
                        look_at = time.monotonic() + 1
                    time.sleep(0.02)
            if store.get("fate") == b"stop":
                _leave(store, rank, everyone)
                raise Preempted("its ranks had not met yet")
        except RuntimeError as error:  # whoever listened is gone
            if preemption.asked():
                raise Preempted("its ranks had not met yet") from None
            raise LowBitError(f"rank 0 at {_place()} has ended ({one_line(error)}); see what it says") from None

    def _who_is_late(self, store: dist.Store, everyone: list[str]) -> str:
        missing = [other for other, key in enumerate(everyone) if not store.check([key])]
        hosts = {store.get(key).decode() for other, key in enumerate(everyone) if other not in missing}
        return (
            f"{_named(missing)} of {self.size} did not come to {_place()} within {limit():g} s (the others are on "
            f"{', '.join(sorted(hosts))}); check the hosts in your hostfile or node list, and what those ranks "
            f"say ({LIMIT} sets the time)"
        )


def _store(rank: int, size: int, deadline: float) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise LowBitError(f"MASTER_ADDR={host} does not resolve ({one_line(error)}); set it to rank 0's host") from None
    listens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not listens:
        _until_reachable(host, port, deadline)
    left = timedelta(seconds=max(deadline - time.monotonic(), 1.0))
    try:
        own: dict[str, Any] = {}
        if listens and (address := loopback(host)):
            own["master_listen_fd"] = _bound(address, port)
        return dist.TCPStore(
            host, port, size, is_master=listens, timeout=left, wait_for_workers=False, multi_tenant=listens, **own
        )
    except (RuntimeError, OSError) as error:
        advice = "set MASTER_PORT to a free port" if listens else "see what rank 0 says"
        raise LowBitError(f"cannot meet at {_place()} ({one_line(error)}); {advice}") from None


def _bound(address: str, port: int) -> int:
    """Return a listening socket of this address alone, which the store takes over; by itself it would listen on all."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(1024)
        return listener.detach()


def _until_reachable(host: str, port: int, deadline: float) -> None:
    """Try to connect until somebody listens. (TCPStore would try as long, and print forty lines about it.)"""
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return
        except OSError as error:
            if preemption.asked():
                raise Preempted("its ranks had not met yet") from None
            if time.monotonic() > deadline:
                raise LowBitError(
                    f"{socket.gethostname()} cannot reach rank 0 at {_place()} within {limit():g} s "
                    f"({one_line(error)}); check that host, its firewall and what rank 0 says ({LIMIT} sets the time)"
                ) from None
            time.sleep(0.2)


def _leave(store: dist.Store, rank: int, everyone: list[str]) -> None:
    """Wait a moment on rank 0, with whom the store goes, for those that have yet to read it."""
    store.set(f"left/{rank}", "")
    patience = time.monotonic() + 5
    while rank == 0 and time.monotonic() < patience:
        if all(store.check([key.replace("here", "left")]) for key in everyone if store.check([key])):
            return
        time.sleep(0.02)


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" and more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
