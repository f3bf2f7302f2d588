"""Text -> token windows for calibration and evaluation, through the `datasets` library.

A source is one of

    stdlib:train | stdlib:calibration | stdlib:validation    the Python standard library's own sources (embedded model)
    FILE.txt (or any other file)                             one long text
    FILE.json | FILE.jsonl                                   documents: strings, or records with a text column
    HUB_ID[:CONFIG[:SPLIT]]                                  a dataset of the hub; rows are joined by blank lines

A long text is tokenized whole and cut into windows of `sequence_length` (the protocol of GPTQ, QLLM and their peers),
evenly spaced over it; where the tokenizer starts a text with a beginning-of-text token, so does every window, because
every prompt will (Gemma 2 is lost without it). Documents stay apart: each is one window, cut at `sequence_length` and
padded on the right. A hub dataset is streamed, no further than `samples` windows can need; its split is train for
calibration and test for evaluation unless named.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.config import LowBitError, one_line

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
        """(ids, mask) of `size` windows at a time, cut to the longest window of the batch."""
        for ids, mask in zip(self.ids.split(size), self.mask.split(size), strict=True):
            length = int(mask.sum(1).max())
            yield ids[:, :length], mask[:, :length]

    def num_batches(self, size: int) -> int:
        return -(-len(self.ids) // size)

    def digest(self) -> str:
        """The same for the same tokens."""
        return hashlib.sha256(self.ids.numpy().tobytes() + self.mask.numpy().tobytes()).hexdigest()[:16]

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())


def token_windows(
    tokenizer: Any, source: str, samples: int, sequence_length: int | None, context: int, key: str
) -> Windows:
    """At most `samples` windows of `source`; `key` (calibration or evaluation) names the config section in errors.

    sequence_length None means the model's `context`, at most 2048. Raises LowBitError for a longer one, and for text
    that is missing, empty or shorter than one window.
    """
    length = sequence_length or min(context, 2048)
    if length > context:
        raise LowBitError(f"{key}.sequence_length={length} is beyond the model's context of {context} tokens")
    documents, separate = _load_text(source, key, samples * length * _CHARACTERS_PER_TOKEN)
    if separate:
        windows = [tokenizer(text, verbose=False)["input_ids"][:length] for text in documents[:samples]]
        windows = [ids for ids in windows if len(ids) > 1]
    else:
        ids = tokenizer(documents[0], verbose=False)["input_ids"]
        bos = getattr(tokenizer, "bos_token_id", None)
        start = ids[:1] if ids and ids[0] == bos else []
        body, step = ids[len(start) :], length - len(start)
        count = len(body) // step
        if count == 0 and len(ids) > 1 and sequence_length is None:
            windows = [ids]
        else:
            chosen = range(count) if count <= samples else [i * count // samples for i in range(samples)]
            windows = [start + body[i * step : (i + 1) * step] for i in chosen]
        if not windows or len(windows[0]) < 2:
            raise LowBitError(
                f"{key}.data={source!r} is too short: {len(ids)} tokens, {length} are one window; give more text or "
                f"a smaller {key}.sequence_length"
            )
    if not windows:
        raise LowBitError(f"{key}.data={source!r} is too short: no document has two tokens; give more text")
    longest = max(len(ids) for ids in windows)
    padded = torch.zeros(len(windows), longest, dtype=torch.int64)
    mask = torch.zeros(len(windows), longest, dtype=torch.bool)
    for row, ids in enumerate(windows):
        padded[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    return Windows(padded, mask)


def stdlib_text(split: str) -> str:
    """Source text of the running Python's standard library: train, calibration (part of train) or validation."""
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


def _load_text(source: str, key: str, enough: int) -> tuple[list[str], bool]:
    """(texts, whether they are documents); a joined text is a list of one, from the hub of `enough` characters."""
    if source.startswith("stdlib:"):
        return [stdlib_text(source.removeprefix("stdlib:"))], False
    import datasets

    path = Path(source)
    suffix = path.suffix.lower()
    separate = suffix in (".json", ".jsonl")
    datasets.disable_progress_bars()
    try:
        if separate or suffix == ".txt" or path.is_file():
            if not path.is_file():
                raise LowBitError(f"{key}.data: file {source!r} does not exist")
            if path.stat().st_size == 0:
                raise LowBitError(f"{key}.data: file {source!r} is empty")
            if separate:
                rows = datasets.load_dataset("json", data_files=str(path), split="train")
            else:
                rows = datasets.load_dataset("text", data_files=str(path), split="train", sample_by="document")
        else:
            name, _, rest = source.partition(":")
            config, _, split = rest.partition(":")
            split = split or ("test" if key == "evaluation" else "train")
            stream = datasets.load_dataset(name, config or None, split=split, streaming=True)
            rows = _first_rows(stream, enough)
    except LowBitError:
        raise
    except Exception as error:  # the library raises whatever its builders, the hub client and pyarrow raise
        raise LowBitError(f"{key}.data={source!r} cannot be loaded: {one_line(error.__cause__ or error)}") from None
    columns = [name for row in islice(rows, 100) for name, value in row.items() if isinstance(value, str)]
    if not columns:
        found = ", ".join(rows[0]) if len(rows) else "no rows"
        raise LowBitError(f"{key}.data={source!r} has no text column (columns: {found})")
    column = "text" if "text" in columns else columns[0]
    texts = [row[column] for row in rows if row[column] and row[column].strip()]
    if not texts:
        raise LowBitError(f"{key}.data={source!r} holds no text")
    return (texts, True) if separate else (["\n\n".join(texts)], False)


def _first_rows(rows: Iterable[dict[str, Any]], characters: int) -> list[dict[str, Any]]:
    """The first rows that together hold that many characters of text."""
    taken = []
    for row in rows:
        taken.append(row)
        characters -= sum(len(value) for value in row.values() if isinstance(value, str))
        if characters <= 0:
            break
    return taken
