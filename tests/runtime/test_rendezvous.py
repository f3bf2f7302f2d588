"""Ranks that find each other: within the time that is set, whatever a peer does, and on loopback alone where they can.

Ranks are forks of this process; each is ended by the test.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from forked import forked
from ports import free_port
from torch import distributed as dist

from megatron_lowbit.config import LowBitError
from megatron_lowbit.runtime import distributed, preemption, presence, rendezvous
from megatron_lowbit.runtime.preemption import Preempted


def rank(number: int, size: int, port: int, **more: object) -> dict[str, object]:
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**place, "MEGATRON_LOWBIT_RENDEZVOUS_SECONDS": 60, **more}


def joins() -> int:
    """What a command does around join."""
    preemption.install()
    try:
        rendezvous.join()
    except LowBitError as error:
        print(error, flush=True)
        return 2
    except Preempted as stop:
        print(stop, flush=True)
        return 99
    print("joined", flush=True)
    return 0


def joins_and_stays() -> int:
    code = joins()
    time.sleep(600)
    return code


@pytest.fixture
def silent():
    """The port of somebody who takes connections and never answers: a rank 0 that has been stopped."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield listener.getsockname()[1]


def test_a_rank_0_that_never_answers(silent):
    with forked(joins, **rank(1, 2, silent, MEGATRON_LOWBIT_RENDEZVOUS_SECONDS=1)) as child:
        code, said = child.finish()
    assert code == 2 and "rank 1 has waited 1 s for an answer from rank 0 at 127.0.0.1" in said
    assert len(said.splitlines()) == 1


def test_a_signal_while_rank_0_does_not_answer(silent):
    with forked(joins, **rank(1, 2, silent)) as child:
        deadline = time.monotonic() + 300
        while not waits_in_the_store(child.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGTERM)
        code, said = child.finish()
    assert (code, said) == (99, "its ranks had not met yet\n")


def waits_in_the_store(pid: int) -> bool:
    return len(list(Path(f"/proc/{pid}/task").iterdir())) > 1


def test_a_peer_that_dies_while_ranks_connect():
    """Between the decision to go and the connections."""

    def dies_or_waits() -> int:
        if os.environ["RANK"] == "1":
            dist.init_process_group = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        return joins()

    port = free_port()
    with ExitStack() as stack:
        children = [
            stack.enter_context(forked(dies_or_waits, **rank(number, 2, port, MEGATRON_LOWBIT_RENDEZVOUS_SECONDS=2)))
            for number in range(2)
        ]
        assert children[1].finish()[0] == -signal.SIGKILL
        code, said = children[0].finish()
    assert code == 2 and ("for its connections with the other 1 ranks" in said or "cannot connect" in said), said


def test_it_says_whom_it_waits_for():
    def impatient() -> int:
        presence.REPORT_AFTER = 0.1
        return joins()

    with forked(impatient, **rank(0, 3, free_port(), MEGATRON_LOWBIT_RENDEZVOUS_SECONDS=2)) as child:
        code, said = child.finish()
    first, *_, last = said.splitlines()
    assert code == 2 and "ranks 1, 2 of 3 to come to 127.0.0.1" in first
    assert "ranks 1, 2 of 3 did not come" in last


def listening(pid: int) -> set[str]:
    """Hexadecimal addresses that a process listens on."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    tables = (Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6"))
    rows = [row.split() for table in tables for row in table]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")
def test_ranks_of_one_machine_listen_on_loopback_alone():
    port, found = free_port(), set()
    with ExitStack() as stack:
        children = [stack.enter_context(forked(joins_and_stays, **rank(number, 2, port))) for number in range(2)]
        for child in children:
            child.read_until("joined")
        for child in children:
            found |= listening(child.pid)
    assert found == {"0100007F"}


def test_names_of_the_loopback():
    assert rendezvous.loopback("127.0.0.1") == "127.0.0.1"
    assert rendezvous.loopback("localhost") in ("127.0.0.1", "::1")
    assert rendezvous.loopback("10.1.2.3") is None and rendezvous.loopback("no-such-host-7") is None


@pytest.mark.parametrize("own_group", [False, True])
def test_the_time_of_a_collective_is_a_setting(own_group):
    """Also of groups that are made later, as frameworks do."""

    def waits() -> int:
        code = joins()
        group = dist.new_group([0, 1]) if own_group else None
        if os.environ["RANK"] == "1":
            time.sleep(600)
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError:
            print("over", flush=True)
        return code

    port = free_port()
    with ExitStack() as stack:
        children = [
            stack.enter_context(forked(waits, **rank(number, 2, port, MEGATRON_LOWBIT_COLLECTIVE_SECONDS=2)))
            for number in range(2)
        ]
        assert children[0].finish() == (0, "joined\nover\n")


@pytest.mark.parametrize(
    ("culprit", "how", "who", "says"),
    [
        (1, "late", "rank 1 on ", "rank 0"),
        (0, "late", "rank 0 on ", "rank 1"),
        (2, "stopped", "rank 2 on ", "rank 0"),
        (0, "stopped", "rank 0, which gives no sign of life", "rank 1"),
        (2, "mute", "rank 2 on an unknown host, which gives no sign of life", "rank 0"),
    ],
)
def test_a_rank_that_waits_says_for_whom(culprit, how, who, says):
    """One of three ranks does not come to their next meeting, or is stopped by a signal, perhaps before it has
    shown itself once; another says so."""

    def meets() -> int:
        presence.BEAT, presence.REPORT_AFTER = 0.1, 1.5
        at_fault = int(os.environ["RANK"]) == culprit
        if at_fault and how == "mute":
            presence.Presence._beat = lambda self: None
        joins()
        if at_fault:
            time.sleep(600)
        distributed.on_every_rank(lambda: None)
        return 0

    port = free_port()
    with ExitStack() as stack:
        ranks = [stack.enter_context(forked(meets, **rank(number, 3, port))) for number in range(3)]
        for child in ranks:
            child.read_until("joined")
        if how == "stopped":
            ranks[culprit].send_signal(signal.SIGSTOP)
        said = ranks[int(says[-1])].read_until(f"for {who}")
        assert f"megatron-lowbit: {says} has waited " in said
        others = [child for number, child in enumerate(ranks) if number not in (culprit, int(says[-1]))]
        if how == "late":
            assert all("has waited" not in child.text for child in others)
        assert ("no sign of life" in said) == (how != "late")


@pytest.mark.parametrize("name", ["MEGATRON_LOWBIT_RENDEZVOUS_SECONDS", "MEGATRON_LOWBIT_COLLECTIVE_SECONDS"])
@pytest.mark.parametrize("value", ["soon", "-1", "nan", "1e9"])
def test_times_that_are_none(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(LowBitError, match=f"{name}='{value}' is no number of seconds"):
        (rendezvous.limit if "RENDEZVOUS" in name else rendezvous.collective_limit)()
