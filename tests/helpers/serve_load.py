"""Many clients at a server for minutes, and thousands of malformed requests: `python tests/helpers/serve_load.py`.

Every answer is compared with what `megatron-lowbit generate` says for the same prompt, so that one that was lost, cut
short or mixed up with another client's is counted. Prints a line of JSON for every figure, as it comes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

PROMPTS = [
    *("def read_lines(path):", "import os", "class A:", "for i in range(", "return self", "x = [", "if not", "a"),
    *("while True:", "try:", "raise ValueError(", "print(", "with open(", "self.name =", "lambda x:", "assert"),
]
NEW = 48


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


def malformed_requests(url: str, model: str, count: int) -> dict[str, int]:
    """{status: answers} to so many malformed bodies; raises where one is not OpenAI's error shape."""
    from malformed import malformed

    random_, seen = random.Random(1), Counter()
    with httpx.Client(timeout=300) as client:
        for _ in range(count):
            path = random_.choice(["/v1/completions", "/v1/chat/completions"])
            answer = client.post(f"{url}{path}", content=malformed(random_, model))
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
            seen[str(answer.status_code)] += 1
    return dict(seen)


def memory(process: subprocess.Popen[str]) -> int:
    """Bytes that the ranks hold."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() or [str(process.pid)]
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


class Told(dict[str, object]):
    """Figures, each printed when it is there."""

    def __setitem__(self, name: str, figure: object) -> None:
        print(json.dumps({name: figure}), flush=True)
        super().__setitem__(name, figure)


def measure(keys: list[str], seconds: float, bad: int, count: int = 32) -> dict[str, object]:
    """Start a server with these keys, load it, and end it by killing its last rank, if there are several."""
    command, found = [sys.executable, "-m", "megatron_lowbit.launch"], Told()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "prompts.txt").write_text("\n".join(PROMPTS))
        prompts = [f"prompts={folder}/prompts.txt", f"max_new_tokens={NEW}", f"output_dir={folder}/generate"]
        subprocess.run([*command, "generate", *keys, *prompts], check=True, capture_output=True)
        rows = json.loads((Path(folder) / "generate" / "generate.json").read_text())["rows"]
        want = {row["prompt"]: row["text"] for row in rows}
        serve = [*command, "serve", *keys, "port=0", f"output_dir={folder}/serve"]
        with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            model, url = re.search(r"serving (\S+) on (\S+)/v1,", line).groups()  # type: ignore[union-attr]
            found["one by one"] = asyncio.run(clients(url, model, 1, seconds / 4, want))
            found["memory before"] = memory(process)
            found["together"] = asyncio.run(clients(url, model, count, seconds, want))
            found["malformed"] = malformed_requests(url, model, bad)
            found["memory after"] = memory(process)
            found["log bytes"] = (Path(folder) / "serve" / "metrics.jsonl").stat().st_size
            ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            start = time.monotonic()
            os.kill(int(ranks[-1]) if ranks else process.pid, signal.SIGKILL)
            found["exit code"] = process.wait(120)
            found["seconds to end"] = time.monotonic() - start
            found["said"] = process.stderr.read()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("keys", nargs="+", help="key=value of serve and generate: model=embedded engine=deepspeed tp=2")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    given = parser.parse_args()
    measure(given.keys, given.seconds, given.malformed, given.clients)
