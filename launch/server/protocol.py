"""What clients may send: the bodies of /v1/completions and /v1/chat/completions, and the shape of every error.

Keys that would have no effect here are taken with the value that has none (frequency_penalty=0) and refused with
another; unknown keys are refused too, as OpenAI refuses them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_lowbit.launch.server.sampling import Sampling

MAX_BODY = 16 * 1024 * 1024  # bytes
MAX_N = 16
MAX_STOPS = 16
MAX_MESSAGE = 500  # characters of an error
IGNORED = ("user", "metadata", "store")
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {  # {key: the values of it that change nothing}
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}


class APIError(Exception):
    """An answer of status 4xx or 5xx, in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        return error_body(self.status, self.message, self.code, self.param)


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return OpenAI's {"error": {message, type, param, code}}."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    shown = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 4] + " ..."
    return {"error": {"message": shown, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False  # noise against who watches the sizes of packets: there is none


class Request(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1, le=MAX_N)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_has_no_effect(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key, harmless in WITHOUT_EFFECT.items():
            if key in values and values[key] not in harmless:
                raise ValueError(f"{key} is not supported; leave it out")
        return {key: value for key, value in values.items() if key not in IGNORED and key not in WITHOUT_EFFECT}

    @model_validator(mode="after")
    def _fits_together(self) -> Request:
        if "" in self.stops:
            raise ValueError("stop holds an empty string, which every text begins with; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options has no effect unless stream is true")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, choice: int) -> Sampling:
        """Return how the choice of this number is sampled: each of a seeded request has a seed of its own."""
        temperature = 1.0 if self.temperature is None else self.temperature
        seed = None if self.seed is None else (self.seed + choice) % 2**63
        return Sampling(temperature, 1.0 if self.top_p is None else self.top_p, seed)


Ids = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(Request):
    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None

    @model_validator(mode="after")
    def _counts(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 asks for nothing; set echo=true to get the prompt back")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def top(self) -> int | None:
        return self.logprobs


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return it as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the old name of max_completion_tokens; set one of them")
        if self.max_tokens == 0:
            raise ValueError("max_tokens=0 asks for nothing; give a positive number")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs has no effect unless logprobs is true")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def parse(kind: type[Request], body: bytes) -> Any:
    """Return the request that a body holds. Raises APIError, status 400, naming the key that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if where.startswith("prompt"):  # pydantic would tell of one kind of prompt alone
            where, message = "prompt", "give a string, a list of strings, token ids, or a list of lists of token ids"
        param = str(first["loc"][0]) if first["loc"] else None
        raise APIError(400, f"{where}: {message}" if where else message, "invalid_value", param) from None
