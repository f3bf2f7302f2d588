"""Text -> token windows for calibration and evaluation.

A source is one of

    stdlib:train | stdlib:calibration | stdlib:validation    the Python standard library's own sources (embedded model)
    gptq:wikitext2 | gptq:ptb:FILE | gptq:c4                 as the papers' perplexities are taken (gptq_text.py)
    a text file, a file of records, a dataset                as texts.py reads them

A long text is tokenized whole and cut into windows of `sequence_length` (the protocol of GPTQ, QLLM and their peers),
evenly spaced over it; where the tokenizer starts a text with a beginning-of-text token, so does every window, because
every prompt will (Gemma 2 is lost without it). Documents stay apart: each is one window, cut at `sequence_length` and
padded on the right. So do conversations, which the tokenizer's chat template writes.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.gptq_text import PREFIX, gptq_windows
from megatron_lowbit.io.texts import Texts, read_texts

# Modules that every Python from 3.11 on has. The embedded model is trained on all but the validation ones.
_CALIBRATION = "ast dataclasses functools inspect mailbox smtplib subprocess tarfile threading typing"
_VALIDATION = "argparse calendar configparser csv difflib fractions heapq shutil statistics textwrap"
_STDLIB = {"calibration": _CALIBRATION.split(" "), "validation": _VALIDATION.split(" ")}
_NO_TRAINING = "test tests idlelib lib2to3 turtledemo site-packages dist-packages encodings ensurepip pydoc_data"
_CHARACTERS_PER_TOKEN = 16  # more than any tokenizer packs into one on average


@dataclass(frozen=True)
class Windows:
    """ids: int64 [windows, length], right-padded with 0; mask: bool [windows, length], True on real tokens."""

    ids: Tensor
    mask: Tensor

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return (ids, mask) of `size` windows at a time, cut to the longest window of the batch."""
        for ids, mask in zip(self.ids.split(size), self.mask.split(size), strict=True):
            length = int(mask.sum(1).max())
            yield ids[:, :length], mask[:, :length]

    def num_batches(self, size: int) -> int:
        return -(-len(self.ids) // size)

    def digest(self) -> str:
        """Return a digest that is the same for the same tokens."""
        return hashlib.sha256(self.ids.numpy().tobytes() + self.mask.numpy().tobytes()).hexdigest()[:16]

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())


def token_windows(
    tokenizer: Any,
    source: str,
    samples: int,
    sequence_length: int | None,
    context: int,
    key: str,
    text_column: str | None = None,
    tell: Callable[[dict[str, Any]], None] = lambda about: None,
) -> Windows:
    """Read a source and cut it into token windows.

    Args:
        tokenizer: Hugging Face tokenizer of the model.
        source: What to read, as listed above.
        samples: The most windows that are wanted.
        sequence_length: Tokens of a window; None: the model's `context`, at most 2048.
        context: Tokens that the model can read.
        key: Config section, calibration or evaluation: for errors, and for a dataset's split.
        text_column: Column of records to read; None chooses one.
        tell: Called with what was read (texts.Texts.about), once there are windows.

    Raises:
        LowBitError: For a length beyond the context, and for text that is missing, empty or shorter than one window.
    """
    length = sequence_length or min(context, 2048)
    if length > context:
        raise LowBitError(f"{key}.sequence_length={length} is beyond the model's context of {context} tokens")
    if source.startswith(PREFIX):
        windows, rows, first = gptq_windows(tokenizer, source, length, key)
        windows = [windows[number] for number in _spread(len(windows), samples)]
        about = {"source": source, "read_as": "text", "column": None, "documents": rows, "left_out": 0, "first": first}
    else:
        texts = _read(tokenizer, source, key, samples, samples * length * _CHARACTERS_PER_TOKEN, text_column)
        windows = _windows(tokenizer, texts, samples, length, sequence_length is None, f"{key}.data={source!r}", key)
        about = texts.about
    longest = max(len(ids) for ids in windows)
    padded = torch.zeros(len(windows), longest, dtype=torch.int64)
    mask = torch.zeros(len(windows), longest, dtype=torch.bool)
    for row, ids in enumerate(windows):
        padded[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    tell({**about, "windows": len(windows), "wanted": samples})
    return Windows(padded, mask)


def _windows(
    tokenizer: Any, texts: Texts, samples: int, length: int, short: bool, what: str, key: str
) -> list[list[int]]:
    """Return the token ids of each window. short: whether a text below one window is one all the same."""
    if texts.apart:
        special = {"add_special_tokens": False} if texts.special else {}
        ids = [tokenizer(text, verbose=False, **special)["input_ids"][:length] for text in texts.documents[:samples]]
        windows = [window for window in ids if len(window) > 1]
        if not windows:
            raise LowBitError(f"{what} is too short: no document has two tokens; give more text")
        return windows
    ids = tokenizer(texts.documents[0], verbose=False)["input_ids"]
    bos = getattr(tokenizer, "bos_token_id", None)
    start = ids[:1] if ids and ids[0] == bos else []
    body, step = ids[len(start) :], length - len(start)
    count = len(body) // step
    if count == 0 and len(ids) > 1 and short:
        return [ids]
    windows = [start + body[i * step : (i + 1) * step] for i in _spread(count, samples)]
    if not windows or len(windows[0]) < 2:
        raise LowBitError(
            f"{what} is too short: {len(ids)} tokens, {length} are one window; give more text or "
            f"a smaller {key}.sequence_length"
        )
    return windows


def _spread(count: int, samples: int) -> Sequence[int]:
    """Return the numbers of `samples` windows of `count`, evenly spaced; of all where there are not more."""
    return range(count) if count <= samples else [i * count // samples for i in range(samples)]


def _read(tokenizer: Any, source: str, key: str, samples: int, characters: int, text_column: str | None) -> Texts:
    if not source.startswith("stdlib:"):
        return read_texts(source, key, tokenizer, samples, characters, text_column)
    if text_column is not None:
        raise LowBitError(f"{key}.text_column={text_column!r}: {key}.data={source!r} is one text, no records")
    text = stdlib_text(source.removeprefix("stdlib:"))
    about = {"source": source, "read_as": "text", "column": None, "documents": 1, "left_out": 0, "first": text[:80]}
    return Texts([text], False, False, about)


def stdlib_text(split: str) -> str:
    """Return the source text of the running Python's standard library: train, calibration (part of train) or
    validation."""
    root = Path(sysconfig.get_path("stdlib"))
    if split == "train":
        files = [
            file
            for file in sorted(root.rglob("*.py"))
            if file.stem not in _STDLIB["validation"]
            and not set(_NO_TRAINING.split()) & set(file.relative_to(root).parts)
        ]
    elif split in _STDLIB:
        files = [root / f"{name}.py" for name in _STDLIB[split]]
    else:
        raise LowBitError(f"stdlib:{split} is not one of stdlib:train, stdlib:calibration, stdlib:validation")
    try:
        return "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    except OSError as error:
        raise LowBitError(f"this Python has no library sources ({error.filename}); name a text file instead") from None
