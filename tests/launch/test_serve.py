"""serve: OpenAI's interface in one process; tokens are generate's, errors are OpenAI's, clients that go free places."""

from __future__ import annotations

import json
import random
import threading
import time

import pytest
import torch
from malformed import malformed
from serving import complete, is_error, served_here, streamed, text_of, wait_until
from tiny_models import embedded_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_lowbit.launch.server.answers import Answers
from megatron_lowbit.launch.server.jobs import Failure
from megatron_lowbit.launch.server.protocol import MAX_BODY
from megatron_lowbit.launch.text import Text

PROMPTS = ["def read_lines(path):\n", "import os\n", "class A:\n    def", "for i in range(", "return", "try:\n    x"]


@pytest.fixture(scope="module")
def served():
    with served_here("model=embedded") as here:
        yield here


@pytest.fixture(scope="module")
def client(served):
    return served[1]


@pytest.fixture(scope="module")
def oracle():
    """(model, tokenizer) of transformers, without anything of ours."""
    folder = embedded_folder()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def expected(oracle, prompt: str, new: int) -> list[int]:
    model, tokenizer = oracle
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    mask = torch.ones_like(ids)
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[
        0, ids.shape[1] :
    ].tolist()


def test_a_batch_of_prompts(client, oracle):
    """All prompts of a request are in flight together, and each gets its own continuation."""
    answer = complete(client, PROMPTS, max_tokens=12)
    new = [expected(oracle, prompt, 12) for prompt in PROMPTS]
    assert [choice["text"] for choice in answer["choices"]] == oracle[1].batch_decode(new, skip_special_tokens=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(PROMPTS)))
    prompted, generated = sum(len(oracle[1](p)["input_ids"]) for p in PROMPTS), sum(map(len, new))
    usage = {"prompt_tokens": prompted, "completion_tokens": generated, "total_tokens": prompted + generated}
    assert answer["usage"] == usage and answer["model"] == "embedded" and answer["object"] == "text_completion"


def test_prompts_as_tokens(client, oracle):
    ids = [oracle[1](prompt)["input_ids"] for prompt in PROMPTS[:2]]
    texts = [choice["text"] for choice in complete(client, ids, max_tokens=5)["choices"]]
    assert texts == [text_of(complete(client, prompt, max_tokens=5)) for prompt in PROMPTS[:2]]
    assert [text_of(complete(client, ids[0], max_tokens=5))] == texts[:1]


def test_a_stream_is_the_answer(client):
    asked = {"prompt": PROMPTS[0], "max_tokens": 20, "temperature": 0, "logprobs": 2}
    whole = complete(client, **asked)
    *chunks, last = streamed(client, **asked, stream_options={"include_usage": True})
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == text_of(whole) and len(chunks) > 5
    assert [choice["finish_reason"] for choice in choices[-2:]] == [None, "length"]
    assert last["usage"] == whole["usage"] and last["choices"] == [] and {chunk["usage"] for chunk in chunks} == {None}
    for key, values in whole["choices"][0]["logprobs"].items():
        assert [value for choice in choices for value in choice["logprobs"][key]] == values
    assert "usage" not in streamed(client, **asked)[-1]


def test_logprobs(client, oracle):
    """The prompt's and those of what follows, against transformers' logits; float32 in both, in other batches."""
    model, tokenizer = oracle
    answer = complete(client, PROMPTS[0], max_tokens=6, logprobs=3, echo=True)
    found = answer["choices"][0]["logprobs"]
    ids = tokenizer(PROMPTS[0])["input_ids"] + expected(oracle, PROMPTS[0], 6)
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    want = [logs[place, token].item() for place, token in enumerate(ids[1:])]
    assert found["token_logprobs"][0] is None
    torch.testing.assert_close(torch.tensor(found["token_logprobs"][1:]), torch.tensor(want), rtol=1e-4, atol=1e-4)
    assert found["tokens"] == [tokenizer.decode([token]) for token in ids]
    best = logs[:-1].topk(3).values
    tops = torch.tensor([sorted(top.values(), reverse=True) for top in found["top_logprobs"][1:]])
    torch.testing.assert_close(tops, best, rtol=1e-4, atol=1e-4)
    text = text_of(answer)
    places = zip(found["text_offset"], ids, strict=True)
    assert all(text[place:].startswith(tokenizer.decode([i], skip_special_tokens=True)) for place, i in places)
    assert text == PROMPTS[0] + tokenizer.decode(expected(oracle, PROMPTS[0], 6), skip_special_tokens=True)
    scored = complete(client, PROMPTS[0], max_tokens=0, logprobs=3, echo=True)
    assert text_of(scored) == PROMPTS[0] and scored["usage"]["completion_tokens"] == 0
    assert scored["choices"][0]["logprobs"]["tokens"] == found["tokens"][:-6]
    echoed = complete(client, PROMPTS[0], max_tokens=0, echo=True)["choices"][0]
    assert echoed == {"index": 0, "text": PROMPTS[0], "logprobs": None, "finish_reason": "length"}


def test_seeds(client):
    def draw(**keys):
        return [
            c["text"] for c in complete(client, PROMPTS[1], max_tokens=16, **{"temperature": 1.0, **keys})["choices"]
        ]

    three = draw(seed=7, n=3)
    assert three == draw(seed=7, n=3) and len(set(three)) == 3
    assert draw(seed=7) == three[:1] and draw(seed=8) == three[1:2], "each choice has a seed of its own"
    twice = complete(client, [PROMPTS[1]] * 2, max_tokens=16, temperature=1.0, seed=7)["choices"]
    assert [c["text"] for c in twice] == [three[0]] * 2, "whichever prompt of a request it is"
    assert draw(seed=9, temperature=0) == draw(seed=10, temperature=0) == draw(seed=9, top_p=0)
    assert draw() != draw()


def test_sampling_has_the_models_distribution(client, oracle):
    """First tokens of 96 draws against top_p's own definition: the smallest set of the likeliest with mass 0.5."""
    model, tokenizer = oracle
    with torch.no_grad():
        shares = model(torch.tensor([tokenizer("import")["input_ids"]])).logits[0, -1].div(1.5).softmax(-1)
    ordered, tokens = shares.sort(descending=True)
    kept = int((ordered.cumsum(0) < 0.5).sum()) + 1
    drawn: list[str] = []
    for seed in range(0, 96, 16):
        answer = complete(client, "import", n=16, max_tokens=1, temperature=1.5, top_p=0.5, seed=seed)
        drawn += [choice["text"] for choice in answer["choices"]]
    names = tokenizer.batch_decode(tokens[:kept].unsqueeze(1))
    assert set(drawn) <= set(names) and kept > 3
    share = ordered[0].item() / ordered[:kept].sum().item()
    assert abs(drawn.count(names[0]) / 96 - share) < 5 * (share * (1 - share) / 96) ** 0.5  # five standard errors


def test_stop(client):
    whole = text_of(complete(client, PROMPTS[0], max_tokens=20))
    stop = whole[8:12]
    assert whole.index(stop) == 8
    for stops in (stop, ["never there", stop]):
        answer = complete(client, PROMPTS[0], max_tokens=20, stop=stops)
        assert text_of(answer) == whole[:8] and answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] < 20
    chunks = streamed(client, prompt=PROMPTS[0], max_tokens=20, temperature=0, stop=stop)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole[:8]


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode(errors="replace")

    def convert_ids_to_tokens(self, token):
        return chr(token)


@pytest.mark.parametrize("stop", [[], ["ßx"], ["日", "never"], ["aab"], ["caab"], [" 日本語"]])
def test_pieces_of_a_text(stop):
    """No piece is taken back, no half character is sent, and a stop string is found however its tokens fall."""
    text = "aaaab 日本語 ßßxy caaabc"
    cut = min([text.find(s) for s in stop if s in text], default=len(text))
    pieces, so_far = [], Text(Bytes(), stop=stop)
    for token in text.encode():
        pieces.append(so_far.put(token))
        assert text[:cut].startswith("".join(pieces))
        if so_far.stopped:
            break
    pieces.append(so_far.end())
    assert "".join(pieces) == text[:cut] and so_far.stopped == (cut < len(text))


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "# {{ m.role }}: {{ m.content }}\n{% endfor %}"
)


def test_chat(served, monkeypatch):
    server, client = served
    asked = {"model": "embedded", "messages": [{"role": "user", "content": "def"}], "temperature": 0, "max_tokens": 6}
    answer = client.post("/v1/chat/completions", json=asked)
    assert is_error(answer, 400) and "has no chat template" in answer.json()["error"]["message"]
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", TEMPLATE)
    answer = client.post("/v1/chat/completions", json={**asked, "logprobs": True, "top_logprobs": 2}).json()
    ids = server.engine.tokenizer("# user: def\n", add_special_tokens=False)["input_ids"]
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": text_of(complete(client, ids, max_tokens=6))}
    assert len(choice["logprobs"]["content"]) == 6 and answer["usage"]["prompt_tokens"] == len(ids)
    first = choice["logprobs"]["content"][0]
    assert first["top_logprobs"][0]["logprob"] == first["logprob"] and bytes(first["bytes"]).decode() == first["token"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "d"}, {"type": "text", "text": "ef"}]}]
    assert (
        client.post("/v1/chat/completions", json={**asked, "messages": parts}).json()["choices"][0]["message"]
        == choice["message"]
    )
    system = [{"role": "system", "content": "be brief"}, *asked["messages"]]
    answer = client.post("/v1/chat/completions", json={**asked, "messages": system})
    assert is_error(answer, 400) and "no system" in answer.json()["error"]["message"]


def test_a_chat_is_as_long_as_the_context_lets_it(served, monkeypatch):
    server, client = served
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", TEMPLATE)
    asked = {"model": "embedded", "messages": [{"role": "user", "content": "x = 1\n" * 30}], "temperature": 0}
    monkeypatch.setattr(type(server.engine), "end_ids", [])
    answer = client.post("/v1/chat/completions", json=asked).json()
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] == 256


def test_models(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "embedded" and client.get("/v1/models/embedded").json() == model
    assert is_error(client.get("/v1/models/a/b"), 404)


WRONG = [
    ({"model": "other"}, 404, "there is no model 'other'"),
    ({"prompt": "x " * 300}, 400, "the model's context is 256"),
    ({"prompt": [5] * 257}, 400, "the model's context is 256"),
    ({"prompt": "x", "max_tokens": 255}, 400, "asks for 255 more"),
    ({"prompt": ""}, 400, "has no tokens"),
    ({"prompt": "x", "max_tokens": 0}, 400, "asks for nothing"),
    ({"prompt": [1024]}, 400, "token 1024 is not in the vocabulary of 1024"),
    ({"prompt": [-1]}, 400, "token -1"),
    ({"prompt": [True]}, 400, "give a string"),
    ({"prompt": None}, 400, "give a string"),
    ({"prompt": []}, 400, "give a string"),
    ({"prompt": ["def"] * 161}, 400, "161 sequences in one request; this server takes 160"),
    ({"temperature": 2.5}, 400, "temperature"),
    ({"temperature": "0"}, 400, "temperature"),
    ({"top_p": -0.1}, 400, "top_p"),
    ({"n": 0}, 400, "n: "),
    ({"n": 17}, 400, "n: "),
    ({"seed": 2**63}, 400, "seed"),
    ({"stop": [""]}, 400, "empty string"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"stream_options": {"include_usage": True}}, 400, "unless stream is true"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty is not supported"),
    ({"temprature": 0.5}, 400, "temprature"),
    ({"best_of": 3}, 400, "best_of"),
    ({"logprobs": 21}, 400, "logprobs"),
]


@pytest.mark.parametrize(("keys", "status", "says"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_requests(client, keys, status, says):
    answer = client.post("/v1/completions", json={"model": "embedded", "prompt": "def", **keys})
    assert is_error(answer, status) and says in answer.json()["error"]["message"]


def test_values_that_change_nothing(client):
    plain = text_of(complete(client, "def", max_tokens=4))
    nothing = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "suffix": None, "user": "me", "n": 1}
    assert text_of(complete(client, "def", max_tokens=4, best_of=1, stream=False, stop=None, **nothing)) == plain


def test_wrong_bodies(client):
    for body in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": "\\ud800"}', b'{"model": NaN}'):
        assert is_error(client.post("/v1/completions", content=body), 400)
    large = client.post("/v1/completions", content=b" " * (MAX_BODY + 1))
    assert is_error(large, 413)

    def without_length():
        for _ in range(MAX_BODY // 2**20 + 1):
            yield b" " * 2**20

    assert is_error(client.post("/v1/completions", content=without_length()), 413)
    assert is_error(client.get("/v1/completions"), 405) and is_error(client.post("/nowhere"), 404)


def test_malformed_requests(served):
    """All are refused in OpenAI's shape, none ends the server."""
    server, client = served
    random_ = random.Random(0)
    for number in range(400):
        body = malformed(random_, "embedded")
        path = random_.choice(["/v1/completions", "/v1/completions", "/v1/chat/completions"])
        answer = client.post(path, content=body)
        assert is_error(answer), (number, path, body[:500], answer.status_code, answer.text[:500])
    assert text_of(complete(client, "def", max_tokens=2))
    wait_until(lambda: not server.scheduler.running)


def test_a_key():
    with served_here("model=embedded", key="sesame") as (_, client):
        for header in (
            {},
            {"Authorization": "Bearer sesam"},
            {"Authorization": "Basic sesame"},
            {"Authorization": "B\u00fc"},
        ):
            encoded = {name: value.encode() for name, value in header.items()}
            for path in ("/v1/models", "/metrics", "/v1/completions"):
                answer = client.request("POST" if "comp" in path else "GET", path, headers=encoded)
                assert is_error(answer, 401) and answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200
        assert client.get("/health").status_code == 200


def test_metrics(client):
    before = figures(client)
    complete(client, ["def", "import"], max_tokens=3, n=2)
    is_error(client.post("/v1/completions", content=b"{"), 400)
    after = figures(client)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown['megatron_lowbit_requests_total{endpoint="/v1/completions",status="200"}'] == 1
    assert grown['megatron_lowbit_requests_total{endpoint="/v1/completions",status="400"}'] == 1
    assert grown["megatron_lowbit_generated_tokens_total"] == 12 and grown["megatron_lowbit_prompt_tokens_total"] == 8
    assert grown["megatron_lowbit_time_to_first_token_seconds_count"] == 1, "of a request, with four sequences"
    assert grown["megatron_lowbit_request_seconds_count"] == 1
    assert after["megatron_lowbit_queue_length"] == 0 == after["megatron_lowbit_wire_bytes_total"]


def figures(client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for line in lines if line[0] != "#" for name, value in [line.rsplit(" ", 1)]}


def test_queue_and_timeout(served, monkeypatch):
    """One sequence runs, one waits, the third is refused; those that take too long are told so."""
    server, client = served
    scheduler = server.scheduler
    monkeypatch.setattr(scheduler, "max_batch", 1)
    monkeypatch.setattr(scheduler, "max_queue", 1)
    body = {"model": "embedded", "prompt": "def", "max_tokens": 2}
    assert is_error(client.post("/v1/completions", json={**body, "n": 3}), 400), "it would never fit"
    long = {**body, "max_tokens": 100, "n": 2}
    busy = threading.Thread(target=client.post, args=("/v1/completions",), kwargs={"json": long})
    busy.start()
    wait_until(lambda: scheduler.running and scheduler.waiting)
    answer = client.post("/v1/completions", json=body)
    assert is_error(answer, 429) and answer.headers["retry-after"] == "1"
    busy.join()
    assert len(client.post("/v1/completions", json={**body, "n": 2}).json()["choices"]) == 2
    monkeypatch.setattr(server, "timeout", 0.0)
    answer = client.post("/v1/completions", json={**body, "n": 2})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "timeout"
    with client.stream("POST", "/v1/completions", json={**body, "n": 2, "stream": True}) as answer:
        *_, last = filter(None, answer.iter_lines())
    assert answer.status_code == 200 and json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    monkeypatch.setattr(server, "timeout", 600.0)
    wait_until(lambda: not scheduler.running)
    assert text_of(complete(client, "def", max_tokens=2))


def test_logits_that_are_not_finite(served, monkeypatch):
    """End the sequence they belong to, and no other."""
    server, client = served
    real, poisoned = server.scheduler.sample, []

    def sample(numbers, logits):
        if len(numbers) > 1 and not poisoned:
            poisoned.append(numbers[0])
        logits = logits.clone()
        for place, number in enumerate(numbers):
            if number in poisoned:
                logits[place] = float("nan")
        return real(numbers, logits)

    monkeypatch.setattr(server.scheduler, "sample", sample)
    answer = client.post("/v1/completions", json={"model": "embedded", "prompt": ["def", "import"], "max_tokens": 4})
    assert answer.status_code == 500 and "not finite" in answer.json()["error"]["message"]
    monkeypatch.undo()
    assert text_of(complete(client, "def", max_tokens=2))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", ["scores", "text", "answer"])
def test_what_goes_wrong_ends_one_request(served, monkeypatch, what, stream):
    """A prompt's logits that are no numbers, a tokenizer that raises, an answer that cannot be built: one error each,
    and the next request is answered."""
    server, client = served

    def fail(*args, **options):
        raise TypeError("of the tokenizer")

    if what == "scores":
        real = server.scheduler.score
        monkeypatch.setattr(server.scheduler, "score", lambda n, logits: real(n, torch.full_like(logits, torch.nan)))
    elif what == "text":
        monkeypatch.setattr(Text, "put", fail)
    else:
        monkeypatch.setattr(Answers, "_name", fail)
    body = {"model": "embedded", "prompt": "def", "max_tokens": 4, "logprobs": 2, "echo": True, "stream": stream}
    answer = client.post("/v1/completions", json=body)
    if stream:
        *_, last = filter(None, answer.text.splitlines())
        assert answer.status_code == 200 and set(json.loads(last.removeprefix("data: "))) == {"error"}
    else:
        assert is_error(answer, 500)
    monkeypatch.undo()
    wait_until(lambda: not server.scheduler.running)
    assert text_of(complete(client, "def", max_tokens=2))


def test_a_closed_server():
    with served_here("model=embedded") as (server, client):
        server.scheduler.close(Failure(503, "stopped", "the server has been stopped"))
        answer = client.post("/v1/completions", json={"model": "embedded", "prompt": "def"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "stopped"
        assert client.get("/health").status_code == 200
        server.scheduler.beat = time.monotonic() - 1000
        assert client.get("/health").status_code == 503
