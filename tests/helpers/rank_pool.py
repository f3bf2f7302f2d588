"""Real gloo ranks for tests: worker processes that start warm (warm.py) and stay up between tests of a file.

    pool = RankPool(2)
    results = pool.run(rank_cases.some_case, argument)      # [some_case(0, 2, argument), some_case(1, 2, argument)]

Workers start with the first `run`. A rank that raises, dies or takes too long ends the whole pool, because its peers
may be left inside a collective; the next `run` starts a new one.
"""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

import warm
from ports import free_port

PATIENCE = 3.0  # seconds that the other ranks get after one has failed, to say whether they failed by themselves


class RankPool:
    def __init__(self, size: int):
        self.size = size
        self._ranks: list[tuple[ForkServerProcess, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
        """Call `function(rank, size, *args)`, a module-level function, on every rank; its results in rank order.

        Re-raises the exception of the lowest rank that failed, its traceback as a note; raises TimeoutError.
        """
        if function.__module__.startswith("tests."):  # pytest's name, which a worker finds in some folders only
            raise ValueError(
                f"{function.__qualname__} belongs into a module beside the tests, which workers can import"
            )
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send_bytes(pickle.dumps((function, args)))
        outcomes = self._collect(timeout)
        failed = [rank for rank, outcome in enumerate(outcomes) if outcome is None or outcome[0] == "error"]
        if failed:
            self.close()
        for rank in failed:  # an exception tells more than the silence of a peer that waits for it
            outcome = outcomes[rank]
            if outcome is not None:
                _, error, text = outcome
                error.add_note(f"raised on rank {rank} of {self.size}:\n{text}")
                raise error
        if failed:
            raise TimeoutError(f"ranks {failed} of {self.size} gave no answer to {function.__name__} in {timeout} s")
        return [outcome[1] for outcome in outcomes if outcome is not None]

    def _collect(self, timeout: float) -> list[Any]:
        """Each rank's answer; None where there is none in time, or where the rank died."""
        outcomes: list[Any] = [None] * self.size
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                rank = waiting.pop(connection)
                try:
                    outcomes[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    process = self._ranks[rank][0]
                    process.join(1)
                    outcomes[rank] = ("error", RuntimeError(f"the process ended (exit code {process.exitcode})"), "")
                if outcomes[rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + PATIENCE)
        return outcomes

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.size):
            ours, theirs = warm.context().Pipe()
            process = warm.context().Process(target=_serve, args=(rank, self.size, port, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a dead worker reads as the end of its pipe
            self._ranks.append((process, ours))

    def close(self) -> None:
        """End the workers that this pool started: each sees that its pipe has closed, or is killed after a second."""
        for _, connection in self._ranks:
            connection.close()
        for process, _ in self._ranks:
            process.join(1)
            if process.is_alive():
                process.kill()
                process.join()
        self._ranks = []


def _serve(rank: int, size: int, port: int, connection: Connection) -> None:
    """A worker's life: join the group, then answer calls until the pipe closes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    import torch  # only now: it reads the environment when it is loaded

    torch.set_num_threads(1)
    joined = False
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            break
        try:
            if not joined:
                torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
                joined = True
            answer = pickle.dumps(("value", function(rank, size, *args)))
        except Exception as error:
            text = traceback.format_exc()
            try:
                answer = pickle.dumps(("error", error, text))
                pickle.loads(answer)
            except Exception:  # an exception class that cannot be rebuilt from its arguments
                answer = pickle.dumps(("error", RuntimeError(repr(error)), text))
        try:
            connection.send_bytes(answer)
        except OSError:  # the pool was closed meanwhile
            break
    os._exit(0)  # peers may be gone, so no goodbye to the group
