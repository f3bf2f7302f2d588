"""Servers for tests: in this process without a socket, or a whole `megatron-lowbit serve` on a free port."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import warm
from commands import started
from starlette.testclient import TestClient

from megatron_lowbit.config import ServeConfig, load_config
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.server.app import Server
from megatron_lowbit.launch.server.jobs import Failure
from megatron_lowbit.launch.server.scheduler import Scheduler, run_batches


@contextmanager
def served_here(*keys: str, key: str | None = None) -> Iterator[tuple[Server, TestClient]]:
    """(server, its client) of an unpatched model in this process; its batches run in a thread."""
    config = load_config(ServeConfig, None, list(keys))
    assert isinstance(config, ServeConfig)
    engine = start_engine(config)
    scheduler = Scheduler(config.max_batch, config.max_queue)
    server = Server(engine, scheduler, "embedded", config.timeout, key)
    batch = engine.batch(config.max_batch)
    thread = threading.Thread(target=run_batches, args=(engine, batch, scheduler), daemon=True)
    thread.start()
    try:
        yield server, TestClient(server.app(), raise_server_exceptions=False)
    finally:
        scheduler.close(Failure(503, "stopped", "the test is over"))
        thread.join(60)
    assert not thread.is_alive()


@contextmanager
def served_there(*argv: object, python: str | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, url) of a whole command once it serves; warm, unless `python` is given."""
    command = [python or warm.python(), "-m", "megatron_lowbit.launch.serve", "port=0", *argv]
    with started(*command) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r" on (http://\S+)/v1,", line)
        assert found is not None, (line, process.communicate(timeout=60))
        yield process, found.group(1)


def complete(client: Any, prompt: Any, url: str = "", **keys: Any) -> dict:
    """The answer to a greedy completion."""
    body = {"model": "embedded", "prompt": prompt, "temperature": 0, **keys}
    answer = client.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(answer: dict) -> str:
    (choice,) = answer["choices"]
    return choice["text"]


def streamed(client: Any, url: str = "", **body: Any) -> list[dict]:
    """The chunks of a stream, which has to end with [DONE]."""
    chunks = []
    with client.stream("POST", f"{url}/v1/completions", json={"model": "embedded", "stream": True, **body}) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line:
                assert line.startswith("data: ")
                chunks.append(line.removeprefix("data: "))
    assert chunks[-1] == "[DONE]"
    return [json.loads(chunk) for chunk in chunks[:-1]]


def at_once(url: str, bodies: list[dict]) -> list[dict]:
    """The answers to completions that are all sent at the same time."""

    def ask(body: dict) -> dict:
        with httpx.Client(timeout=300) as client:
            return complete(client, url=url, **body)

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(ask, bodies))


def is_error(answer: Any, status: int | None = None) -> bool:
    """Whether an answer is of status 4xx, and of OpenAI's error shape."""
    error = answer.json()["error"]
    good = 400 <= answer.status_code < 500 if status is None else answer.status_code == status
    return good and error.keys() == {"message", "type", "param", "code"} and bool(error["message"])


def wait_until(ready: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)
