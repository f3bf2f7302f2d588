"""serve as its own processes: two ranks, many clients at once, the openai client, kills, signals, a port in use."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from functools import partial

import httpx
import openai
import pytest
from commands import needs_deepspeed, needs_megatron, ranks_of, run_here, run_there
from ports import free_port
from serving import at_once, complete, served_here, served_there, text_of, wait_until

PROMPTS = ["def read_lines(path):", "import os", "class A:", "for i in range(", "return self", "x = [", "if not", "a"]
NEW = 24
RUNNING = "megatron_lowbit_running_sequences 1.0"


@pytest.fixture(scope="module")
def expected(embedded_artifact, tmp_path_factory):
    """{engine: {prompt: generate's row}} of the artifact on two ranks, real or virtual."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    keys = [f"artifact={embedded_artifact}", f"prompts={folder / 'prompts.txt'}", f"max_new_tokens={NEW}"]

    def rows(engine: str, *more: str) -> dict[str, dict]:
        output = folder / engine
        assert run_here("generate", *keys, f"engine={engine}", *more, f"output_dir={output}") == 0
        return {row["prompt"]: row for row in json.loads((output / "generate.json").read_text())["rows"]}

    return rows


def check_tokens(url: str, name: str, want: dict[str, dict]) -> None:
    """Four times every prompt, of different lengths, all at once: each gets the tokens that generate gives it alone."""
    asked = [(prompt, NEW - 5 * turn) for turn in range(4) for prompt in PROMPTS]
    answers = at_once(url, [{"model": name, "prompt": prompt, "max_tokens": new} for prompt, new in asked])
    for (prompt, new), answer in zip(asked, answers, strict=True):
        whole = want[prompt]["text"]
        assert whole.startswith(text_of(answer)) and answer["usage"]["completion_tokens"] <= new
        if new == NEW:
            assert text_of(answer) == whole
            assert answer["usage"]["completion_tokens"] == want[prompt]["new_tokens"]


def test_one_rank(embedded_artifact, expected, tmp_path):
    """Then SIGTERM ends it: an answer that is on its way gets an error, and the exit code is 0."""
    keys = [f"artifact={embedded_artifact}", "virtual_tp=2", f"output_dir={tmp_path}", "max_batch=12"]
    want = expected("huggingface", "virtual_tp=2")
    with served_there(*keys) as (process, url):
        check_tokens(url, "embedded", want)
        use_the_openai_client(url, want)
        stop_in_the_middle(process, url)
        assert process.wait(60) == 0
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
    row = json.loads((tmp_path / "serve.json").read_text())["rows"][0]
    assert row["new_tokens"] > 32 * 9 and row["values"] > 0
    records = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 3, "a start, an end, and one record whatever the number of requests"


def use_the_openai_client(url: str, want: dict[str, dict]) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["embedded"]
    asked = {"model": "embedded", "prompt": PROMPTS[0], "max_tokens": NEW, "temperature": 0}
    answer = client.completions.create(**asked)
    assert answer.choices[0].text == want[PROMPTS[0]]["text"] and answer.usage.completion_tokens == NEW
    stream = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.text for chunk in stream for c in chunk.choices) == answer.choices[0].text
    assert stream[-1].usage == answer.usage
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.completions.create(**{**asked, "model": "gpt-4"})
    with pytest.raises(openai.BadRequestError, match="no chat template") as refused:
        client.chat.completions.create(model="embedded", messages=[{"role": "user", "content": "hello"}])
    assert refused.value.code == "no_chat_template" and refused.value.param == "messages"


def stop_in_the_middle(process, url: str) -> None:
    with httpx.stream("POST", f"{url}/v1/completions", json=long_request(), timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        *_, last = filter(None, lines)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopped"


def long_request() -> dict:
    return {"model": "embedded", "prompt": "def", "max_tokens": 250, "temperature": 1, "stream": True}


def running(client: httpx.Client, url: str) -> bool:
    return RUNNING in client.get(f"{url}/metrics").text


def idle(client: httpx.Client, url: str) -> bool:
    return not running(client, url)


def test_a_client_that_goes_frees_its_place(tmp_path):
    """Whether it reads a stream or waits for an answer in one: with one place and no queue, the next is let in."""
    with served_there("model=embedded", "max_batch=1", "max_queue=0", f"output_dir={tmp_path}") as (process, url):
        for streams in (True, False):
            with (
                httpx.Client(timeout=60) as client,
                socket.create_connection(url.removeprefix("http://").split(":")) as s,
            ):
                body = json.dumps({**long_request(), "stream": streams}).encode()
                head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                s.sendall(head.encode() + body)
                wait_until(partial(running, client, url))
                assert client.post(f"{url}/v1/completions", json=long_request()).status_code == 429
                s.close()
                wait_until(partial(idle, client, url))
                metrics = client.get(f"{url}/metrics").text
                made = [line for line in metrics.splitlines() if line.startswith("megatron_lowbit_generated_tokens")]
                assert float(made[0].split()[1]) < 250, "it was generated to its end for nobody"
                assert text_of(complete(client, "def", url, max_tokens=1))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


@needs_deepspeed
def test_two_ranks(embedded_artifact, expected, tmp_path):
    """Tokens are generate's on as many ranks, whose messages are counted."""
    keys = [f"artifact={embedded_artifact}", "engine=deepspeed", "tp=2", f"output_dir={tmp_path}"]
    want = expected("deepspeed", "tp=2")
    with served_there(*keys) as (_, url):
        check_tokens(url, "embedded", want)
        assert "megatron_lowbit_wire_bytes_total 0.0" not in httpx.get(f"{url}/metrics").text


@pytest.mark.slow
@needs_deepspeed
def test_a_rank_that_dies(tmp_path):
    """It ends the server with one line, and a client that is being answered is told."""
    keys = ["model=embedded", "engine=deepspeed", "tp=2", f"output_dir={tmp_path}"]
    with served_there(*keys, python=sys.executable) as (process, url):
        failed: list[str] = []

        def ask() -> None:
            with httpx.stream("POST", f"{url}/v1/completions", json=long_request(), timeout=60) as answer:
                failed.extend(answer.iter_lines())

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: failed)
        os.kill(ranks_of(process, 2)[1], signal.SIGKILL)
        assert process.wait(60) == 2
        asking.join(60)
        assert json.loads([line for line in failed if line][-1].removeprefix("data: "))["error"]["code"] == "stopped"
        said = process.stderr.read().splitlines()
        assert len(said) == 1 and said[0].startswith("megatron-lowbit: ") and "another rank" in said[0]


@pytest.mark.slow
@needs_megatron
def test_megatron(embedded_artifact, expected, tmp_path):
    """Its dynamic engine has more requests than places, some go in the middle, and an answer can be drawn."""
    keys = [f"artifact={embedded_artifact}", "engine=megatron", "tp=2", f"output_dir={tmp_path}", "max_batch=8"]
    want = expected("megatron", "tp=2")
    with served_there(*keys) as (process, url):
        check_tokens(url, "embedded", want)
        with httpx.Client(timeout=60) as client:
            with client.stream("POST", f"{url}/v1/completions", json=long_request()) as answer:
                next(answer.iter_lines())
            wait_until(partial(idle, client, url))
            drawn = [complete(client, "def", url, max_tokens=9, temperature=1, seed=seed) for seed in (3, 3, 4)]
            assert text_of(drawn[0]) == text_of(drawn[1]) != text_of(drawn[2])
            whole = complete(client, PROMPTS[0], url, max_tokens=4, logprobs=1, echo=True)["choices"][0]
            assert whole["text"] == PROMPTS[0] + want[PROMPTS[0]]["text"][: len(whole["text"]) - len(PROMPTS[0])]
            assert None not in whole["logprobs"]["token_logprobs"][1:]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_port_in_use(tmp_path):
    """Is told in one line before the model is loaded: the one named here could not be."""
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        serve = ["-m", "megatron_lowbit.launch.serve", f"model={tmp_path}", f"output_dir={tmp_path / 'run'}"]
        code, said, error = run_there(sys.executable, *serve, f"port={port}")
    assert (code, said) == (2, "")
    assert len(error.splitlines()) == 1 and f"cannot listen at host=127.0.0.1 port={port}" in error


@pytest.mark.parametrize("host", ["not a host", "256.1.1.1", "\u00e9" * 80])
def test_hosts_that_are_none(host, capsys, tmp_path):
    assert run_here("serve", "model=embedded", f"host={host}", f"output_dir={tmp_path}") == 2
    assert "cannot listen at host=" in capsys.readouterr().err


def test_an_empty_key(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MEGATRON_LOWBIT_API_KEY", " ")
    assert run_here("serve", "model=embedded", "port=0", f"output_dir={tmp_path}") == 2
    assert "MEGATRON_LOWBIT_API_KEY is set, but is no key" in capsys.readouterr().err


def test_places_and_memory_of_many_requests():
    """Nothing is kept of a request that is over."""
    with served_here("model=embedded") as (server, client):
        for _ in range(20):
            complete(client, PROMPTS[:3], max_tokens=2)
        wait_until(lambda: not server.scheduler.running)
        assert not server.scheduler.waiting
