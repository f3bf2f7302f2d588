"""The HTTP side of serve, an ASGI application: routes, the key, bodies, streams, clients that go away."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from megatron_lowbit.config import LowBitError
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.generate import encode
from megatron_lowbit.launch.server.answers import Answers, Choice
from megatron_lowbit.launch.server.jobs import Failure, Job, Piece
from megatron_lowbit.launch.server.metrics import Metrics
from megatron_lowbit.launch.server.protocol import (
    MAX_BODY,
    APIError,
    ChatRequest,
    CompletionRequest,
    Request,
    error_body,
    parse,
)
from megatron_lowbit.launch.server.sampling import Sampler
from megatron_lowbit.launch.server.scheduler import Full, Scheduler
from megatron_lowbit.launch.text import Text

logger = logging.getLogger("megatron_lowbit")

BODY_SECONDS = 60.0  # that a client may take to send its request
SILENT = 60.0  # seconds without a plan after which /health says so
DEFAULT_TOKENS = 16  # of a completion that does not say, as at OpenAI's
CLOSED_REQUEST = 499  # in the count of requests alone: the client has gone


class Server:
    """Answers requests for one model. key: what clients must send, None: nothing."""

    def __init__(self, engine: Engine, scheduler: Scheduler, name: str, timeout: float, key: str | None = None):
        self.engine, self.scheduler, self.name, self.timeout, self.key = engine, scheduler, name, timeout, key
        self.metrics = Metrics(engine, scheduler)
        self.created = int(time.time())
        self._tokenizing = threading.Lock()

    def app(self) -> Starlette:
        routes = [
            ("/v1/completions", "POST", self.completions),
            ("/v1/chat/completions", "POST", self.chat),
            ("/v1/models", "GET", self.models),
            ("/v1/models/{model:path}", "GET", self.model),
            ("/metrics", "GET", self.prometheus),
            ("/health", "GET", self.health),
        ]
        return Starlette(
            routes=[Route(path, self._answering(path, run), methods=[method]) for path, method, run in routes],
            exception_handlers={HTTPException: _no_route},
        )

    def _answering(
        self, path: str, run: Callable[[HTTPRequest], Awaitable[Response]]
    ) -> Callable[[HTTPRequest], Awaitable[Response]]:
        """Return the endpoint: whatever goes wrong is answered in OpenAI's shape, and every answer is counted."""

        async def endpoint(request: HTTPRequest) -> Response:
            try:
                if path != "/health":
                    self._check_key(request)
                response = await run(request)
            except APIError as error:
                headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
                response = JSONResponse(error.body(), error.status, headers)
            except ClientDisconnect:
                response = Response(status_code=CLOSED_REQUEST)
            except Exception:
                logger.exception("a request to %s failed", path)
                response = JSONResponse(error_body(500, "the server failed at this request; its log says why"), 500)
            self.metrics.requests.labels(path, response.status_code).inc()
            return response

        return endpoint

    def _check_key(self, request: HTTPRequest) -> None:
        if self.key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            raise APIError(
                401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`", "invalid_api_key"
            )

    async def health(self, request: HTTPRequest) -> Response:
        if time.monotonic() - self.scheduler.beat > SILENT:
            return JSONResponse({"status": "the ranks give no sign of life"}, 503)
        return JSONResponse({"status": "ok"})

    async def prometheus(self, request: HTTPRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: HTTPRequest) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "megatron-lowbit"}
        return {**about, "max_model_len": self.engine.context}

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise APIError(
                404, f"there is no model {name[:200]!r} here; this is {self.name!r}", "model_not_found", "model"
            )

    async def completions(self, request: HTTPRequest) -> Response:
        asked: CompletionRequest = parse(CompletionRequest, await _body(request))
        self._check_model(asked.model)
        most, count = self.scheduler.max_queue + self.scheduler.max_batch, len(asked.prompts) * (asked.n or 1)
        if count > most:
            raise APIError(
                400, f"{count} sequences in one request; this server takes {most}", "invalid_value", "prompt"
            )
        prompts = await asyncio.to_thread(lambda: [self._encode(prompt) for prompt in asked.prompts])
        room = min(self.engine.context - len(prompt) for prompt in prompts)
        new = min(DEFAULT_TOKENS, room) if asked.max_tokens is None else asked.max_tokens
        echoed = [await asyncio.to_thread(self._decode, ids) for ids in prompts] if asked.echo else None
        return await self._generate(request, asked, prompts, new, echoed)

    async def chat(self, request: HTTPRequest) -> Response:
        asked: ChatRequest = parse(ChatRequest, await _body(request))
        self._check_model(asked.model)
        prompt = await asyncio.to_thread(self._encode_chat, asked)
        new = self.engine.context - len(prompt) if asked.new_tokens is None else asked.new_tokens
        return await self._generate(request, asked, [prompt], new, None)

    def _encode(self, prompt: str | list[int]) -> list[int]:
        """Return the token ids of a prompt. Raises APIError for one that the model cannot continue."""
        if isinstance(prompt, str):
            try:
                with self._tokenizing:
                    return encode(self.engine, prompt)
            except LowBitError as error:
                raise APIError(400, str(error), _code(str(error)), "prompt") from None
        vocab = self.engine.text_config.vocab_size
        wrong = next((token for token in prompt if not 0 <= token < vocab), None)
        if wrong is not None:
            raise APIError(400, f"token {wrong} is not in the vocabulary of {vocab}", "invalid_value", "prompt")
        if len(prompt) > self.engine.context:
            raise self._too_long(len(prompt), 0)
        return prompt

    def _encode_chat(self, asked: ChatRequest) -> list[int]:
        tokenizer = self.engine.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise APIError(
                400, f"{self.name!r} has no chat template; use /v1/completions", "no_chat_template", "messages"
            )
        messages = [message.plain() for message in asked.messages]
        try:
            with self._tokenizing:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # the template is a program of its own: it may raise what it likes
            raise APIError(
                400, f"the model's chat template does not take these messages: {error}", "invalid_value", "messages"
            ) from None
        if not ids:
            raise APIError(400, "the messages have no tokens; give some text", "invalid_value", "messages")
        return self._encode(ids)

    def _decode(self, ids: list[int]) -> str:
        return self.engine.tokenizer.decode(ids, skip_special_tokens=True)

    def _too_long(self, prompt: int, new: int) -> APIError:
        wants = f"{prompt} tokens and asks for {new} more" if new else f"{prompt} tokens"
        return APIError(
            400,
            f"the prompt has {wants}; the model's context is {self.engine.context}",
            "context_length_exceeded",
            "prompt",
        )

    async def _generate(
        self, request: HTTPRequest, asked: Any, prompts: list[list[int]], new: int, echoed: list[str] | None
    ) -> Response:
        """Queue the sequences of a request and answer with what comes. echoed: the prompts' texts, to come first."""
        longest = max(map(len, prompts))
        scored = echoed is not None and asked.top is not None
        if longest + new > self.engine.context or (new == 0 and not scored and echoed is None):
            raise self._too_long(longest, max(new, 1))
        events: asyncio.Queue[Piece | Failure] = asyncio.Queue()
        loop, count = asyncio.get_running_loop(), asked.n or 1

        def emit(event: Piece | Failure) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        deadline = time.monotonic() + self.timeout
        jobs = [
            self._job(asked, index, prompts[index // count], new, scored, emit, deadline)
            for index in range(len(prompts) * count)
        ]
        answers = Answers(
            self.name,
            self.engine.tokenizer,
            isinstance(asked, ChatRequest),
            asked.top is not None,
            sum(map(len, prompts)),
        )
        if echoed is not None:
            for job in jobs:
                events.put_nowait(Piece(job.index, echoed[job.index // count]))
        if new or scored:
            try:
                self.scheduler.submit(jobs)
            except Full:
                raise APIError(429, "the server's queue is full; try again later", "queue_full") from None
        else:
            for job in jobs:
                job.over = True
                events.put_nowait(Piece(job.index, finish="length"))
        pieces = self._pieces(jobs, events)
        if asked.stream:
            stream = self._stream(answers, asked, jobs, pieces)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        choices = [Choice() for _ in jobs]
        await _unless_gone(request, _collect(pieces, choices))
        return JSONResponse(answers.whole(choices))

    def _job(
        self,
        asked: Request,
        index: int,
        prompt: list[int],
        new: int,
        scored: bool,
        emit: Callable[[Piece | Failure], None],
        deadline: float,
    ) -> Job:
        sampling = asked.sampling(index % (asked.n or 1))
        processors = self.engine.logits_processors(sampling.temperature, sampling.top_p, sampling.greedy, len(prompt))
        sampler = Sampler(sampling, processors, prompt)
        behind = [] if isinstance(asked, ChatRequest) else prompt  # a message is a text of its own
        text = Text(self.engine.tokenizer, behind, asked.stops)
        top: int | None = asked.top  # type: ignore[attr-defined]
        return Job(index, prompt, new, sampler, text, self.engine.end_ids, emit, deadline, top, scored)

    async def _pieces(self, jobs: list[Job], events: asyncio.Queue[Piece | Failure]) -> AsyncIterator[Piece]:
        """Yield what comes until all sequences are over. Raises APIError where one fails; whoever stops listening frees
        the places of all."""
        open_choices = len(jobs)
        try:
            while open_choices:
                event = await events.get()
                if isinstance(event, Failure):
                    raise APIError(event.status, event.message, event.code)
                if event.finish is not None:
                    open_choices -= 1
                yield event
            self._measure(jobs)
        finally:
            self.scheduler.cancel(jobs)

    def _measure(self, jobs: list[Job]) -> None:
        """Count a request that was answered, whatever the number of its sequences."""
        self.metrics.seconds.observe(time.monotonic() - jobs[0].began)
        firsts = [job.first_token for job in jobs if job.first_token is not None]
        if firsts:
            self.metrics.first_token.observe(min(firsts))

    async def _stream(
        self, answers: Answers, asked: Request, jobs: list[Job], pieces: AsyncIterator[Piece]
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events: a chunk for every piece, the usage if it was asked for, and [DONE]."""
        generated = [0] * len(jobs)
        usage = {"usage": None} if asked.includes_usage else {}
        try:
            async for piece in pieces:
                generated[piece.index] = max(generated[piece.index], piece.tokens)
                yield _event({**answers.piece(piece), **usage})
            if asked.includes_usage:
                yield _event(answers.last(generated))
            yield b"data: [DONE]\n\n"
        except APIError as error:  # the status has been sent: the error is an event, and no [DONE] follows
            yield _event(error.body())
        except Exception:
            logger.exception("a stream failed")
            yield _event(error_body(500, "the server failed at this request; its log says why"))
        finally:
            self.scheduler.cancel(jobs)


async def _collect(pieces: AsyncIterator[Piece], choices: list[Choice]) -> None:
    async for piece in pieces:
        choices[piece.index].add(piece)


async def _unless_gone(request: HTTPRequest, work: Any) -> None:
    """Run `work` as long as the client is there. Raises ClientDisconnect where it goes."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _body(request: HTTPRequest) -> bytes:
    """Return a request's body. Raises APIError for one that is too large, or takes too long to come."""
    too_large = APIError(413, f"the request is larger than {MAX_BODY:,} bytes; send less at once", "request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 15 or int(length) > MAX_BODY):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise too_large
    except TimeoutError:
        raise APIError(408, f"the request did not come within {BODY_SECONDS:.0f} s", "timeout") from None
    return bytes(body)


def _code(message: str) -> str:
    return "context_length_exceeded" if "the model's context is" in message else "invalid_value"


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n".encode()


async def _no_route(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: f"there is nothing at {request.url.path[:200]!r}", 405: f"{request.method} is not allowed here"}
    message = messages.get(error.status_code, str(error.detail))
    return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)
