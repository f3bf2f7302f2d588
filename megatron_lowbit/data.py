"""Text -> token windows for calibration and evaluation, through the `datasets` library.

A source is one of

    stdlib:train | stdlib:calibration | stdlib:validation    the Python standard library's own sources (embedded model)
    FILE.txt (or any other file)                             one long text
    FILE.json | FILE.jsonl                                   documents: strings, or records with a text column
    HUB_ID[:CONFIG[:SPLIT]]                                  a dataset of the hub; rows are joined by blank lines

A long text is tokenized whole and cut into windows of `sequence_length` (the protocol of GPTQ, QLLM and their peers),
evenly spaced over it. Documents stay apart: each is one window, cut at `sequence_length`, padded on the right.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
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
    documents, separate = _load_text(source, key)
    if separate:
        windows = [tokenizer(text, verbose=False)["input_ids"][:length] for text in documents[:samples]]
        windows = [ids for ids in windows if len(ids) > 1]
    else:
        ids = tokenizer(documents[0], verbose=False)["input_ids"]
        count = len(ids) // length
        if count == 0 and len(ids) > 1 and sequence_length is None:
            windows = [ids]
        else:
            chosen = range(count) if count <= samples else [i * count // samples for i in range(samples)]
            windows = [ids[i * length : (i + 1) * length] for i in chosen]
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


def _load_text(source: str, key: str) -> tuple[list[str], bool]:
    """(texts, whether they are separate documents); a joined text is a list of one."""
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
            rows = datasets.load_dataset(name, config or None, split=split or "train")
    except LowBitError:
        raise
    except Exception as error:  # the library raises whatever its builders, the hub client and pyarrow raise
        raise LowBitError(f"{key}.data={source!r} cannot be loaded: {one_line(error.__cause__ or error)}") from None
    columns = [
        name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if not columns:
        raise LowBitError(f"{key}.data={source!r} has no text column (columns: {', '.join(rows.column_names)})")
    texts = [text for text in rows["text" if "text" in columns else columns[0]] if text and text.strip()]
    if not texts:
        raise LowBitError(f"{key}.data={source!r} holds no text")
    return (texts, True) if separate else (["\n\n".join(texts)], False)
