"""Evaluation text joined and cut as GPTQ's loaders do it, whose perplexities both QLLM and its peers report.

    gptq:wikitext2[:FILE]    WikiText-2 raw, test: all rows, empty ones too, joined by blank lines
    gptq:ptb:FILE            Penn Treebank, validation: all sentences, joined by blank lines
    gptq:c4[:FILE]           C4, the first of eight validation files: 256 windows from documents that Python's random
                             generator draws with seed 0, until one is long enough, each at a place that it draws too

The joined text is tokenized at once and cut into windows of equal length, one after the other; what is left at the end
does not count. A beginning-of-text token stands before the first window alone, if the tokenizer writes one. (QLLM's
loaders, as published, are the reference: papers' "PTB" and "C4" are these, not the later ptb-new and c4-new.)

Without FILE the text comes from the hub. A FILE is the text itself, a row per line (wiki.test.raw, ptb.valid.txt), or
records: .jsonl, .json.gz, .parquet, ...
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lowbit.config import LowBitError, one_line, shown
from megatron_lowbit.io.hub import check_on_hub

PREFIX = "gptq:"
COLUMNS = {"wikitext2": "text", "ptb": "sentence", "c4": "text"}
HUB = {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4"}
C4_FILE, C4_WINDOWS = "en/c4-validation.00000-of-00008.json.gz", 256


def parse_source(source: str, key: str) -> tuple[str, str | None]:
    """Return (wikitext2, ptb or c4, the file or None). Raises LowBitError for what is none of the forms above."""
    name, _, file = source.removeprefix(PREFIX).partition(":")
    if name not in COLUMNS:
        raise LowBitError(f"{key}.data={shown(source)} is not one of gptq:wikitext2, gptq:ptb:FILE, gptq:c4")
    if key != "evaluation":
        raise LowBitError(
            f"{key}.data={shown(source)} is what perplexity is measured on; {key} takes other text, such as "
            "Salesforce/wikitext:wikitext-2-raw-v1:train"
        )
    if not file and name == "ptb":
        raise LowBitError(
            "evaluation.data=gptq:ptb needs a file: the hub has it as a script alone, which the datasets library no "
            "longer runs; gptq:ptb:ptb.valid.txt"
        )
    if file and not os.path.isfile(file):
        raise LowBitError(f"{key}.data: file {shown(file)} does not exist")
    return name, file or None


def gptq_windows(tokenizer: Any, source: str, length: int, key: str = "evaluation") -> tuple[list[list[int]], int, str]:
    """Return (the token ids of all windows, number of rows, how the text begins).

    Raises LowBitError for text that is missing, or shorter than one window.
    """
    name, file = parse_source(source, key)
    try:
        rows = _rows(name, file)
    except LowBitError:
        raise
    except Exception as error:  # whatever the hub client, pyarrow and the file raise
        raise LowBitError(f"{key}.data={shown(source)} cannot be loaded: {one_line(error)}") from None
    cut = _drawn if name == "c4" else _consecutive
    windows = cut(tokenizer, rows, length)
    if not windows:
        raise LowBitError(
            f"{key}.data={shown(source)} is too short: it has no window of {length} tokens; give more text or a "
            f"smaller {key}.sequence_length"
        )
    return windows, len(rows), next(row for row in rows if row.strip())[:80]


def _consecutive(tokenizer: Any, rows: Sequence[str], length: int) -> list[list[int]]:
    ids = tokenizer("\n\n".join(rows), verbose=False)["input_ids"]
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def _drawn(tokenizer: Any, rows: Sequence[str], length: int) -> list[list[int]]:
    generator, windows = random.Random(0), list[list[int]]()
    tokens: dict[int, list[int]] = {}  # of documents that were drawn before
    while len(windows) < C4_WINDOWS and (len(tokens) < len(rows) or any(len(ids) >= length for ids in tokens.values())):
        number = generator.randint(0, len(rows) - 1)
        if number not in tokens:
            tokens[number] = tokenizer(rows[number], verbose=False)["input_ids"]
        ids = tokens[number]
        if len(ids) >= length:
            # Of a document of exactly one window the loaders draw from an empty range, and end.
            start = generator.randint(0, len(ids) - length - 1) if len(ids) > length else 0
            windows.append(ids[start : start + length])
    return windows


def _rows(name: str, file: str | None) -> list[str]:
    """Return the rows of a text as its dataset on the hub has them."""
    import datasets

    from megatron_lowbit.io.texts import RECORDS, format_of, read_rows

    column = COLUMNS[name]
    if file is not None and format_of(Path(file)) not in RECORDS:
        # WikiText's rows keep their line break, and lines without a word are empty rows; PTB's have no white space
        # around them.
        with open(file, encoding="utf-8") as opened:
            lines = list(opened)  # splitlines would also split at \u2028 and the like
        return [line.strip() for line in lines] if name == "ptb" else [line if line.strip() else "" for line in lines]
    if file is not None:
        records: Any = read_rows(file, "evaluation")[0]
    else:
        folder = HUB[name].replace("/", "___")
        if not (Path(datasets.config.HF_DATASETS_CACHE) / folder).is_dir():  # else the library reads it from there
            check_on_hub(HUB[name], "dataset", "evaluation.data")
        if name == "c4":
            records = datasets.load_dataset(HUB[name], data_files={"validation": C4_FILE}, split="validation")
        else:
            records = datasets.load_dataset(HUB[name], "wikitext-2-raw-v1", split="test")
    if column not in (records.column_names or ()):
        raise LowBitError(f"evaluation.data: {shown(file or name)} has no column {column!r}")
    return list(records[column])
