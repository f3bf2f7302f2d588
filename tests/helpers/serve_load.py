"""What a server bears: `python tests/helpers/serve_load.py model=embedded engine=deepspeed tp=2`.

    load        many clients for minutes. Every answer is compared with what `megatron-lowbit generate` says for its
                prompt, so that one that was lost, cut short or mixed up with another client's is counted
    malformed   thousands of malformed requests, each of which has to be refused with status 4xx in OpenAI's shape
    kill        the last rank is killed while all clients are being answered

Prints a line of JSON for every figure, as it comes; `--only malformed kill` leaves the load out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
from malformed import malformed
from serving import complete, is_error, served_there, text_of

PROMPTS = [
    *("def read_lines(path):", "import os", "class A:", "for i in range(", "return self", "x = [", "if not", "a"),
    *("while True:", "try:", "raise ValueError(", "print(", "with open(", "self.name =", "lambda x:", "assert"),
]
NEW = 48
PARTS = ["load", "malformed", "kill"]
PATHS = ["/v1/completions", "/v1/chat/completions"]


async def ask(client: httpx.AsyncClient, url: str, model: str, prompt: str, new: int) -> tuple[str, float, int]:
    """(text, seconds to the first token, tokens) of a streamed greedy completion."""
    body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    start, first, text, tokens = time.monotonic(), 0.0, "", 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            for choice in chunk.get("choices", ()):
                first = first or time.monotonic() - start
                text += choice["text"]
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    return text, first, tokens


async def clients(url: str, model: str, count: int, seconds: float, want: dict[str, str]) -> dict[str, float]:
    """Let `count` clients ask one after the other for so many seconds; the figures of all."""
    firsts: list[float] = []
    seen: Counter[str] = Counter()
    start = time.monotonic()

    async def one(number: int) -> None:
        random_ = random.Random(number)
        async with httpx.AsyncClient(timeout=300) as client:
            while time.monotonic() - start < seconds:
                prompt, new = random_.choice(PROMPTS), random_.choice([NEW // 4, NEW // 2, NEW])
                seen["asked"] += 1
                text, first, tokens = await ask(client, url, model, prompt, new)
                whole = text == want[prompt] if new == NEW else want[prompt].startswith(text) and tokens == new
                seen["right" if whole else "wrong"] += 1
                seen["tokens"] += tokens
                firsts.append(first)

    await asyncio.gather(*map(one, range(count)))
    spent = time.monotonic() - start
    ordered = sorted(firsts)
    return {
        "clients": count,
        "seconds": spent,
        "requests": seen["asked"],
        "lost": seen["asked"] - seen["right"] - seen["wrong"],
        "wrong": seen["wrong"],
        "tokens_per_second": seen["tokens"] / spent,
        "first_token_p50": statistics.median(ordered),
        "first_token_p95": ordered[int(0.95 * (len(ordered) - 1))],
    }


async def malformed_requests(url: str, model: str, count: int, connections: int) -> dict[str, float]:
    """{status: answers} to so many malformed bodies, on connections that are kept alive; raises where one is not
    refused with status 4xx in OpenAI's error shape."""
    random_, seen = random.Random(1), Counter[str]()
    left = iter([(random_.choice(PATHS), malformed(random_, model)) for _ in range(count)])
    start = time.monotonic()

    async def one() -> None:
        async with httpx.AsyncClient(timeout=300) as client:
            for path, body in left:
                answer = await client.post(f"{url}{path}", content=body)
                assert is_error(answer), (path, body[:500], answer.status_code, answer.text[:500])
                seen[str(answer.status_code)] += 1

    await asyncio.gather(*(one() for _ in range(connections)))
    return {"requests": seen.total(), "seconds": time.monotonic() - start, **seen}


async def killed(process: subprocess.Popen[str], url: str, model: str, count: int) -> dict[str, object]:
    """What comes of `count` clients whose answers are on their way when the last rank is killed, and of the server."""
    ranks = children(process)
    started, outcomes = [asyncio.Event() for _ in range(count)], Counter[str]()
    body = {"model": model, "prompt": "def", "max_tokens": 200, "temperature": 1, "stream": True}

    async def one(begun: asyncio.Event) -> None:
        last = ""
        try:
            async with (
                httpx.AsyncClient(timeout=300) as client,
                client.stream("POST", f"{url}/v1/completions", json=body) as answer,
            ):
                async for line in answer.aiter_lines():
                    last = line or last
                    begun.set()
            outcomes["told why" if "error" in last else "answered whole"] += 1
        except httpx.TransportError:
            outcomes["cut off"] += 1

    tasks = [asyncio.ensure_future(one(event)) for event in started]
    await asyncio.gather(*(event.wait() for event in started))
    start = time.monotonic()
    os.kill(ranks[-1] if ranks else process.pid, signal.SIGKILL)
    ended = asyncio.ensure_future(asyncio.to_thread(process.wait, 120))
    await asyncio.gather(*tasks)
    known, code = time.monotonic() - start, await ended
    seconds = {"seconds until all clients know": known, "seconds to end": time.monotonic() - start}
    return {"exit code": code, **seconds, "clients": dict(outcomes)}


def answered(url: str, model: str) -> str:
    with httpx.Client(timeout=300) as client:
        return text_of(complete(client, "def", url, model=model, max_tokens=8))


def children(process: subprocess.Popen[str]) -> list[int]:
    """The ranks that a server of several has started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def memory(process: subprocess.Popen[str]) -> int:
    """Bytes that the ranks hold."""
    pids = children(process) or [process.pid]
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


class Told(dict[str, object]):
    """Figures, each printed when it is there."""

    def __setitem__(self, name: str, figure: object) -> None:
        print(json.dumps({name: figure}), flush=True)
        super().__setitem__(name, figure)


def measure(keys: list[str], only: list[str], seconds: float, bad: int, count: int = 32) -> dict[str, object]:
    """Start a server with these keys, and do to it what `only` says."""
    found = Told()
    with tempfile.TemporaryDirectory() as folder:
        want = generated(keys, Path(folder)) if "load" in only else {}
        with served_there(*keys, f"output_dir={folder}/serve", python=sys.executable) as (process, url):
            model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
            if "load" in only:
                found["one by one"] = asyncio.run(clients(url, model, 1, seconds / 4, want))
                found["memory before load"] = memory(process)
                found["together"] = asyncio.run(clients(url, model, count, seconds, want))
                found["memory after load"] = memory(process)
            if "malformed" in only:
                before = answered(url, model)
                found["memory before malformed"] = memory(process)
                found["malformed"] = asyncio.run(malformed_requests(url, model, bad, count))
                found["memory after malformed"] = memory(process)
                assert answered(url, model) == before, "it answers no more as it did"
            if "kill" in only:
                found["kill"] = asyncio.run(killed(process, url, model, count))
            else:
                process.terminate()
                found["exit code"] = process.wait(120)
            assert process.stderr is not None
            found["said"] = process.stderr.read()
            found["log bytes"] = (Path(folder) / "serve" / "metrics.jsonl").stat().st_size
    return found


def generated(keys: list[str], folder: Path) -> dict[str, str]:
    """{prompt: what generate says}."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    prompts = [f"prompts={folder}/prompts.txt", f"max_new_tokens={NEW}", f"output_dir={folder}/generate"]
    command = [sys.executable, "-m", "megatron_lowbit.launch", "generate"]
    subprocess.run([*command, *keys, *prompts], check=True, capture_output=True)
    rows = json.loads((folder / "generate" / "generate.json").read_text())["rows"]
    return {row["prompt"]: row["text"] for row in rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="+", help="key=value of serve and generate: model=embedded engine=deepspeed tp=2")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    given = parser.parse_intermixed_args()
    measure(given.keys, given.only, given.seconds, given.malformed, given.clients)
