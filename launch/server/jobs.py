"""One sequence that a request asks for, from its prompt to its last token, and what is told of it on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron_lowbit.launch.server.sampling import LogProb, Sampler, log_prob, prompt_log_probs
from megatron_lowbit.launch.text import Text


@dataclass(frozen=True)
class Piece:
    """What is new of a sequence. finish: "stop" or "length" in the last piece."""

    index: int
    text: str = ""
    tokens: int = 0  # so far, of the whole sequence
    log_probs: Sequence[LogProb] = ()
    prompt_log_probs: Sequence[LogProb] = ()
    finish: str | None = None


@dataclass(frozen=True)
class Failure:
    """Why a sequence ends without its last token: an HTTP status, OpenAI's error code, and a sentence."""

    status: int
    code: str
    message: str


@dataclass(eq=False)
class Job:
    """A sequence. index: among those of its request; emit: is called with each Piece, or a Failure, from the thread
    that runs the model."""

    index: int
    prompt: list[int]
    max_tokens: int
    sampler: Sampler
    text: Text
    ends: Collection[int]  # tokens that end a text
    emit: Callable[[Piece | Failure], None]
    deadline: float  # of time.monotonic
    top: int | None = None  # log-probabilities of so many tokens in each place; None: none at all
    scored: bool = False  # whether those of the prompt are wanted too
    over: bool = False
    began: float = field(default_factory=time.monotonic)
    first_token: float | None = None  # seconds until it came
    _waiting: list[LogProb] = field(default_factory=list)  # of tokens whose text is held back

    def score(self, logits: Tensor) -> None:
        """Tell the log-probabilities of the prompt, of its logits [length, vocab]."""
        self.emit(Piece(self.index, prompt_log_probs=prompt_log_probs(logits, self.prompt, self.top or 0)))
        if self.max_tokens == 0:
            self._finish("", "length")

    def take(self, logits: Tensor) -> int:
        """Choose the next token, of logits [vocab], and tell it."""
        logits = logits.float().cpu()
        token = self.sampler(logits)
        if self.first_token is None:
            self.first_token = time.monotonic() - self.began
        if self.top is not None:
            self._waiting.append(log_prob(logits, token, self.top))
        new = self.text.put(token)
        if token in self.ends or self.text.stopped:
            self._finish(new + self.text.end(), "stop")
        elif self.text.length >= self.max_tokens:
            self._finish(new + self.text.end(), "length")
        elif new:
            self._tell(new, None)
        return token

    def fail(self, failure: Failure) -> None:
        self.over = True
        self.emit(failure)

    def _finish(self, text: str, why: str) -> None:
        self.over = True
        self._tell(text, why)

    def _tell(self, text: str, finish: str | None) -> None:
        told, self._waiting = self._waiting, []
        self.emit(Piece(self.index, text, self.text.length, told, finish=finish))
