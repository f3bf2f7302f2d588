"""What clients get: OpenAI's objects, of a whole answer or of a piece of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_lowbit.launch.server.jobs import Piece
from megatron_lowbit.launch.server.sampling import LogProb


@dataclass
class Choice:
    """What has come of one sequence."""

    text: str = ""
    tokens: int = 0
    log_probs: list[LogProb] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens = max(self.tokens, piece.tokens)
        self.log_probs += [*piece.prompt_log_probs, *piece.log_probs]
        self.finish = piece.finish or self.finish


class Answers:
    """Builds the objects of one request. chat: of /v1/chat/completions. with_log_probs: whether it asked for them."""

    def __init__(self, model: str, tokenizer: Any, chat: bool, with_log_probs: bool, prompt_tokens: int):
        self.model, self.tokenizer, self.chat, self.with_log_probs = model, tokenizer, chat, with_log_probs
        self.prompt_tokens = prompt_tokens
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}  # {choice: characters of its tokens so far}, for text_offset

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""
        built = []
        for index, choice in enumerate(choices):
            log_probs = self._log_probs(index, choice.log_probs)
            said = {"message": {"role": "assistant", "content": choice.text}} if self.chat else {"text": choice.text}
            built.append({"index": index, **said, "logprobs": log_probs, "finish_reason": choice.finish})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": built, "usage": self.usage(c.tokens for c in choices)}

    def piece(self, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a stream that a piece becomes."""
        log_probs = self._log_probs(piece.index, [*piece.prompt_log_probs, *piece.log_probs])
        if self.chat:
            role = {} if piece.index in self._begun else {"role": "assistant"}
            self._begun.add(piece.index)
            said: dict[str, Any] = {"delta": {**role, "content": piece.text}}
        else:
            said = {"text": piece.text}
        choice = {"index": piece.index, **said, "logprobs": log_probs, "finish_reason": piece.finish}
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": [choice]}

    def last(self, generated: Iterable[int]) -> dict[str, Any]:
        """Return the chunk behind all choices that tells the usage."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": self.usage(generated)}

    def usage(self, generated: Iterable[int]) -> dict[str, int]:
        completion = sum(generated)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _log_probs(self, index: int, found: Sequence[LogProb]) -> dict[str, Any] | None:
        if not self.with_log_probs:
            return None
        return {"content": [self._chat_token(f) for f in found]} if self.chat else self._completion_tokens(index, found)

    def _completion_tokens(self, index: int, found: Sequence[LogProb]) -> dict[str, Any]:
        offsets = []
        for each in found:  # special tokens are among the tokens, not in the text
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(self.tokenizer.decode([each.token], skip_special_tokens=True))
        return {
            "tokens": [self._name(f.token) for f in found],
            "token_logprobs": [f.value for f in found],
            "top_logprobs": [None if f.value is None else self._top(f) for f in found],
            "text_offset": offsets,
        }

    def _top(self, found: LogProb) -> dict[str, float]:
        """Return {text: log-probability}: of tokens with the same text, the likeliest."""
        return {self._name(token): value for token, value in sorted(found.top.items(), key=lambda item: item[1])}

    def _chat_token(self, found: LogProb) -> dict[str, Any]:
        return {
            **self._described(found.token, found.value),
            "top_logprobs": [self._described(token, value) for token, value in found.top.items()],
        }

    def _described(self, token: int, value: float | None) -> dict[str, Any]:
        name = self._name(token)
        return {"token": name, "logprob": value, "bytes": list(name.encode())}

    def _name(self, token: int) -> str:
        return self.tokenizer.decode([token])
