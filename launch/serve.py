"""megatron-lowbit serve: a server with OpenAI's HTTP interface, for a model on any engine.

Rank 0 listens: its main thread runs the model with the other ranks (server/scheduler.py), a second one is the HTTP
server (uvicorn). The model is loaded once the port is known to be free.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from megatron_lowbit.config import LowBitError, ServeConfig, one_line
from megatron_lowbit.launch.engines.prepare import apply_prepared, check_head, prepare_artifact
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.rows import row_name
from megatron_lowbit.launch.runner import of_a_collective, run_stage
from megatron_lowbit.launch.saturation import logged, measure_saturation, print_saturation
from megatron_lowbit.launch.server.app import Server
from megatron_lowbit.launch.server.jobs import Failure
from megatron_lowbit.launch.server.scheduler import Scheduler, run_batches
from megatron_lowbit.launch.tokenizer import check_tokenizer
from megatron_lowbit.runtime import preemption
from megatron_lowbit.runtime.distributed import on_rank_zero
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger
from megatron_lowbit.runtime.preemption import Preempted

CONFIG = ServeConfig
KEY = "MEGATRON_LOWBIT_API_KEY"
LEAVE = 5  # seconds that answers on their way have at the end


def run(config: ServeConfig, logger: MetricLogger) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_Listener(config))
        key = on_rank_zero(_key)
        check_head(config)
        engine = start_engine(config, [config.weights])
        artifact = prepare_artifact(engine, config, logger)
        check_tokenizer(engine.tokenizer)
        apply_prepared(engine, artifact, config.comm)
        batch = engine.batch(config.max_batch)
        scheduler = Scheduler(config.max_batch, config.max_queue) if env_rank() == 0 else None
        if scheduler is not None:
            server = Server(engine, scheduler, served_name(config), config.timeout, key)
            stack.enter_context(listener.serving(server))
        try:
            run_batches(engine, batch, scheduler)
        except RuntimeError as error:
            if not of_a_collective(error):
                raise
            raise LowBitError(f"another rank has ended, and the server with it ({one_line(error)})") from None
        figures = measure_saturation(engine)
    row = {"name": row_name(engine, artifact, config.comm.mode), **figures}
    if scheduler is not None:
        row |= {"prompt_tokens": scheduler.prompted, "new_tokens": scheduler.generated}
        logger.log(prompt_tokens=scheduler.prompted, new_tokens=scheduler.generated, **logged(row))
        print_saturation([row], sys.stderr)
    if any(number != preemption.signal.SIGTERM for number in preemption.received):
        raise Preempted("it starts over when it is run again")
    return {"rows": [row]}


def served_name(config: ServeConfig) -> str:
    """Return the name that clients ask for: the hub id, or the folder's own name."""
    name = config.artifact or config.model or ""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _key() -> str | None:
    key = os.environ.get(KEY)
    if key is not None and (not key.strip() or not key.isprintable() or not key.isascii()):
        raise LowBitError(f"{KEY} is set, but is no key of printable ASCII characters; set one, or unset it")
    return None if key is None else key.strip()


class _Listener:
    """Rank 0's socket. It is bound at once, so that a port in use is told before a model is loaded, and listens when
    there is somebody to answer."""

    def __init__(self, config: ServeConfig):
        self.config = config
        self.socket: socket.socket | None = None

    def __enter__(self) -> _Listener:
        on_rank_zero(self._bind)
        return self

    def __exit__(self, *error: object) -> None:
        if self.socket is not None:
            self.socket.close()

    def _bind(self) -> None:
        host, port = self.config.host, self.config.port
        try:
            ((family, _, _, _, address), *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self.socket = socket.socket(family, socket.SOCK_STREAM)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(address)
        except (OSError, UnicodeError) as error:
            raise LowBitError(
                f"cannot listen at host={host} port={port}: {one_line(error)}; choose another, or port=0 for any"
            ) from None

    @contextlib.contextmanager
    def serving(self, server: Server) -> Iterator[None]:
        """Answer requests inside; at the end those that are left get an error, and their connections are closed."""
        assert self.socket is not None
        try:
            self.socket.listen()
        except OSError as error:  # another server has bound it at the same time
            raise LowBitError(
                f"cannot listen at host={self.config.host} port={self.config.port}: {one_line(error)}; choose another"
            ) from None
        options = uvicorn.Config(
            server.app(),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=LEAVE,
            server_header=False,
            proxy_headers=False,
        )
        http = uvicorn.Server(options)
        thread = threading.Thread(target=http.run, args=([self.socket],), name="http", daemon=True)
        try:
            thread.start()
            self._tell(server)
            yield
        finally:
            server.scheduler.close(Failure(503, "stopped", "the server has been stopped"))
            http.should_exit = True
            if thread.ident is not None:
                thread.join(2 * LEAVE)

    def _tell(self, server: Server) -> None:
        assert self.socket is not None
        host, port = self.socket.getsockname()[:2]
        url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
        if not host.startswith("127.") and host != "::1" and server.key is None:
            print(f"whoever reaches {host} may use this server: {KEY} is not set", file=sys.stderr)
        print(f"serving {server.name} on {url}, engine={self.config.engine} tp={server.engine.tp_size}; try:")
        print(f"  curl {url}/completions \\")
        if server.key is not None:
            print(f'    -H "Authorization: Bearer ${KEY}" \\')
        print(f'    -d \'{{"model": "{server.name}", "prompt": "def", "max_tokens": 16}}\'', flush=True)


if __name__ == "__main__":
    sys.exit(run_stage("serve", sys.argv[1:]))
