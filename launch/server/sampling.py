"""From logits to a token, for one sequence; and the log-probabilities that a request may ask for.

The logits are first changed as transformers' generate changes them (Engine.logits_processors): by the penalties of
the model's generation_config.json and, where tokens are drawn, by temperature and top_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLDEST = 1e-5  # temperatures below this are greedy: logits divided by them would overflow
_ROWS = 256  # of a prompt's logits in float32 at once


class NotFinite(Exception):
    """Logits that are no numbers: no token can be chosen, or scored."""


@dataclass(frozen=True)
class Sampling:
    """What a request says: greedy at temperature 0 or top_p 0. seed None: another text each time."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST or self.top_p == 0


class Sampler:
    """Chooses the tokens of one sequence; its random numbers are its own, whatever else is generated."""

    def __init__(self, sampling: Sampling, processors: Any, prompt: Sequence[int]):
        self.greedy, self.processors = sampling.greedy, processors
        self.ids = list(prompt)
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """Return the token that follows, of float32 logits [vocab]. Raises NotFinite where they are not finite."""
        scores = logits.unsqueeze(0)
        if self.processors:
            scores = self.processors(torch.tensor([self.ids]), scores)
        if not torch.isfinite(scores.max()):
            raise NotFinite("the logits are not finite")
        if self.greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))
        self.ids.append(token)
        return token


@dataclass(frozen=True)
class LogProb:
    """One token's log-probability (None for a prompt's first), and the likeliest in its place, {token: ...}."""

    token: int
    value: float | None
    top: dict[int, float]


def log_prob(logits: Tensor, token: int, top: int) -> LogProb:
    """Return that of a token, of float32 logits [vocab], before temperature and top_p."""
    return _log_probs(logits.unsqueeze(0), [token], top)[0]


def prompt_log_probs(logits: Tensor, ids: Sequence[int], top: int) -> list[LogProb]:
    """Return that of every token of a prompt, of logits [length, vocab]."""
    found = [LogProb(ids[0], None, {})]
    for first in range(0, len(ids) - 1, _ROWS):
        targets = ids[first + 1 : first + 1 + _ROWS]
        found += _log_probs(logits[first : first + len(targets)].float(), targets, top)
    return found


def _log_probs(logits: Tensor, targets: Sequence[int], top: int) -> list[LogProb]:
    logs = logits.log_softmax(-1).clamp_min(-9999.0)  # JSON has no infinity
    if logs.isnan().any():
        raise NotFinite("the logits are not finite")
    values = logs.gather(1, torch.tensor(targets, device=logs.device).unsqueeze(1)).flatten().tolist()
    best, tokens = (found.tolist() for found in logs.topk(min(top, logs.shape[1]), dim=1))
    tops = [dict(zip(t, b, strict=True)) for t, b in zip(tokens, best, strict=True)]
    return [LogProb(t, v, top_of) for t, v, top_of in zip(targets, values, tops, strict=True)]
