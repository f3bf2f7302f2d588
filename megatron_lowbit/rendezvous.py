"""How the ranks of a launched job find each other, within a bounded time and with one line where they do not.

Rank 0 (under torchrun its agent) listens at MASTER_ADDR:MASTER_PORT. Every rank signs in there; then the first that
sees all names decides "go" and all start the process group, or one that was told to stop meanwhile decides "stop". It
is a single compare-and-set, so nobody goes on alone. Ranks wait MEGATRON_LOWBIT_RENDEZVOUS_SECONDS (300) for the last.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import torch
from torch import distributed as dist

from megatron_lowbit import preemption
from megatron_lowbit.config import LowBitError, one_line
from megatron_lowbit.distributed import device, env_rank, env_world_size
from megatron_lowbit.preemption import Preempted

LIMIT = "MEGATRON_LOWBIT_RENDEZVOUS_SECONDS"
COLLECTIVES = timedelta(minutes=30)  # a rank that is silent for longer has failed


def join() -> None:
    """Make the process group of all ranks; nothing where there is one.

    Raises LowBitError naming the ranks that did not come, and Preempted.
    """
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    rank, size, deadline = env_rank(), env_world_size(), time.monotonic() + limit()
    store = dist.PrefixStore(
        f"lowbit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", _store(rank, size, deadline)
    )
    _all_come(store, rank, size, deadline)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVES)
    except RuntimeError as error:
        raise LowBitError(f"the {size} ranks met at {_place()} but cannot connect ({one_line(error)})") from None


def limit() -> float:
    """Seconds that ranks wait for each other."""
    text = os.environ.get(LIMIT, "300")
    try:
        seconds = float(text)
        if not 0 < seconds < 1e6:
            raise ValueError
    except ValueError:
        raise LowBitError(f"{LIMIT}={text!r} is no number of seconds; set one such as 300") from None
    return seconds


def _place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _store(rank: int, size: int, deadline: float) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise LowBitError(f"MASTER_ADDR={host} does not resolve ({one_line(error)}); set it to rank 0's host") from None
    listens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not listens:
        _until_reachable(host, port, deadline)
    try:
        return dist.TCPStore(
            host, port, size, is_master=listens, timeout=COLLECTIVES, wait_for_workers=False, multi_tenant=listens
        )
    except RuntimeError as error:
        advice = "set MASTER_PORT to a free port" if listens else "see what rank 0 says"
        raise LowBitError(f"cannot meet at {_place()} ({one_line(error)}); {advice}") from None


def _until_reachable(host: str, port: int, deadline: float) -> None:
    """Try to connect until somebody listens. (TCPStore would try as long, but deaf to signals.)"""
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


def _all_come(store: dist.Store, rank: int, size: int, deadline: float) -> None:
    try:
        if not preemption.asked():
            store.set(f"here/{rank}", socket.gethostname())
        everyone = [f"here/{other}" for other in range(size)]
        while not store.check(["fate"]):
            if preemption.asked():
                store.compare_set("fate", "", "stop")
            elif store.check(everyone):
                store.compare_set("fate", "", "go")
            elif time.monotonic() > deadline:
                missing = [other for other, key in enumerate(everyone) if not store.check([key])]
                hosts = {store.get(f"here/{other}").decode() for other in range(size) if other not in missing}
                raise LowBitError(
                    f"{_named(missing)} of {size} did not come to {_place()} within {limit():g} s (the others are on "
                    f"{', '.join(sorted(hosts))}); check the hosts in your hostfile or node list, and what those ranks "
                    f"say ({LIMIT} sets the time)"
                )
            else:
                time.sleep(0.02)
        if store.get("fate") == b"stop":
            _leave(store, rank, everyone)
            raise Preempted("its ranks had not met yet")
    except RuntimeError as error:  # whoever listened is gone
        if preemption.asked():
            raise Preempted("its ranks had not met yet") from None
        raise LowBitError(f"rank 0 at {_place()} has ended ({one_line(error)}); see what it says") from None


def _leave(store: dist.Store, rank: int, everyone: list[str]) -> None:
    """Rank 0, with whom the store goes, waits a moment for those that have yet to read it."""
    store.set(f"left/{rank}", "")
    patience = time.monotonic() + 5
    while rank == 0 and time.monotonic() < patience:
        if all(store.check([key.replace("here", "left")]) for key in everyone if store.check([key])):
            return
        time.sleep(0.02)


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" and more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
