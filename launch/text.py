"""The text of new tokens: whole, or while they come, as what can be shown already and is not going to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def continuation(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Return the text of new tokens as it stands behind their prompt's; an empty prompt: as a text of its own.

    They are decoded behind the prompt's last token, because a tokenizer like Llama 2's leaves out the space that a
    text begins with.
    """
    before = prompt[-1:]
    shown = len(tokenizer.decode(before, skip_special_tokens=True)) if before else 0
    return str(tokenizer.decode([*before, *new], skip_special_tokens=True))[shown:]


class Text:
    """A continuation's text so far; its pieces joined are the text of all its tokens.

    prompt: as in continuation. stop: strings of which the first to appear ends it, and is not part of it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        self.tokenizer, self.prompt, self.stop = tokenizer, list(prompt[-1:]), tuple(stop)
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
        return continuation(self.tokenizer, self.prompt, self.tokens)

    def _send(self, text: str) -> str:
        new = text[len(self.sent) :]
        self.sent += new
        return new


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text a stop string may begin with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
