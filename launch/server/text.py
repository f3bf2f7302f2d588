"""The text of a sequence while its tokens come: what can be sent already, and whether a stop string ends it.

Its text at any time is the tokenizer's decode of all its new tokens, as `generate` prints it, so that the pieces of a
stream joined are the text of an answer in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Text:
    """The text so far. stop: strings of which the first to appear ends it, and is not part of it."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.sent = ""
        self.stopped = False

    def put(self, token: int) -> str:
        """Add a token; returns the text that is new and will not change: neither half a character nor what may become
        a stop string."""
        self.tokens.append(token)
        text = self._decoded()
        found = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._send(text[: min(found)])
        if text.endswith("\ufffd"):  # half a character: the next token completes it
            return ""
        held = max((_begun(text, stop) for stop in self.stop), default=0)
        return self._send(text[: len(text) - held])

    def end(self) -> str:
        """Return what was held back."""
        return "" if self.stopped else self._send(self._decoded())

    def _decoded(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def _send(self, text: str) -> str:
        new = text[len(self.sent) :]
        self.sent += new
        return new


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text a stop string may begin with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
