"""The text of new tokens: whole, or while they come, as what can be shown already and is not going to change.

Decoding everything again at every token would be quadratic. Text decodes a short window instead: the tokens since the
place before the last at which all text was settled. Decoders treat their first token in another way (Llama 2's leaves
out its space), so the tokens between those two places are decoded too, and their text is cut off.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of SentencePiece's byte fallback


def continuation(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Return the text of new tokens as it stands behind their prompt's; an empty prompt: as a text of its own.

    They are decoded behind the prompt's last token, because a tokenizer like Llama 2's leaves out the space that a
    text begins with.
    """
    before = prompt[-1:]
    return _decode(tokenizer, [*before, *new])[len(_decode(tokenizer, before)) :]


class Text:
    """A continuation's text so far; its pieces joined are the text of all its tokens.

    prompt: as in continuation. stop: strings of which the first to appear ends it, and is not part of it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.length = 0  # tokens so far
        self.stopped = False
        self._held = self._unsettled = ""  # settled text that may become a stop string; text of the tokens since
        self._settle(list(prompt[-1:]))

    def put(self, token: int) -> str:
        """Add a token; returns the text that is new and will not change: neither half a character nor what may become
        a stop string."""
        self.length += 1
        self._window.append(token)
        before = self._unsettled
        self._unsettled = _decode(self.tokenizer, self._window)[self._shown :]
        text = self._held + self._unsettled
        found = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        # A special token has no text, so it ends no row of bytes.
        if self._unsettled == before or text.endswith("\ufffd") or self._is_byte(token):
            return ""
        self._settle(self._window[self._read :])
        sent = len(text) - max((_begun(text, stop) for stop in self.stop), default=0)
        self._held = text[sent:]
        return text[:sent]

    def end(self) -> str:
        """Return what was held back."""
        return "" if self.stopped else self._held + self._unsettled

    def _settle(self, behind: list[int]) -> None:
        """Begin a window with tokens whose text is settled; those that come are decoded behind them."""
        self._window, self._read, self._shown = behind, len(behind), len(_decode(self.tokenizer, behind))
        self._unsettled = ""

    def _is_byte(self, token: int) -> bool:
        """Tell whether the next token may change this one's text: of bytes in a row, one that makes no character turns
        them all into replacement characters."""
        return _BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(token))) is not None


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text a stop string may begin with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
