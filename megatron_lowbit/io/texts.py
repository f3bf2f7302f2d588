"""Read text from files and datasets: in which format, which column, and conversations by the chat template.

    FILE.json .jsonl .ndjson .csv .tsv .parquet .arrow    records; each is a document of its own
    any other FILE                                        one long text
    FOLDER written by save_to_disk                        rows, joined by blank lines; FOLDER::SPLIT of a DatasetDict
    HUB_ID[:CONFIG[:SPLIT]], or a folder of data files    rows, joined by blank lines, read no further than needed

Files may be compressed (.gz, .bz2, .xz, .zst). Text is UTF-8 unless a byte order mark says UTF-16 or UTF-32. Without a
split named, calibration reads `train` and evaluation `test`. columns.py chooses the column.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megatron_lowbit.config import LowBitError, one_line, shown
from megatron_lowbit.io.columns import Column, choose_column, enough_rows, records_inside
from megatron_lowbit.io.hub import check_on_hub

RECORDS = {
    "json": "json",
    "jsonl": "json",
    "ndjson": "json",
    "csv": "csv",
    "tsv": "csv",
    "parquet": "parquet",
    "arrow": "arrow",
}
_COMPRESSED = {"gz": b"\x1f\x8b", "bz2": b"BZh", "xz": b"\xfd7zXZ\x00", "zst": b"\x28\xb5\x2f\xfd"}
_ARCHIVES = {"zip": b"PK\x03\x04", "7z": b"7z\xbc\xaf\x27\x1c", "rar": b"Rar!", "lz4": b"\x04\x22\x4d\x18"}
_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
HEAD = 100  # rows, at least, that a column is chosen by
_FURTHEST = 100_000  # rows that a column of a known name may be empty in


@dataclass(frozen=True)
class Texts:
    """Documents in order, and what they are.

    apart: whether each is a window of its own; else there is one, of all rows.
    special: whether they hold the tokenizer's special tokens already (a chat template wrote them).
    about: for the user and the JSON result: source, read_as, column, documents, characters, left_out, first.
    """

    documents: list[str]
    apart: bool
    special: bool
    about: dict[str, Any]


def read_texts(
    source: str, key: str, tokenizer: Any, samples: int, characters: int, text_column: str | None = None
) -> Texts:
    """Read the text that `key`.data=source names.

    Args:
        source: A file, folder or dataset, as listed above.
        key: Config section, for errors and for the split: calibration or evaluation.
        tokenizer: Whose chat template writes conversations.
        samples: Documents that are wanted, where they stay apart.
        characters: Text that is enough, where rows are joined and a dataset is streamed.
        text_column: Column to read; None chooses one.

    Raises:
        LowBitError: For a source that is missing, unreadable, empty or holds no text.
    """
    check_source(source, key)
    try:
        rows, read_as, apart = read_rows(source, key)
        head, rows = _peek(rows, text_column)
        wrapped = records_inside(head[0]) if read_as == "json" and len(head) == 1 else None
        if wrapped is not None:
            head, rows = wrapped[1][:HEAD], iter(wrapped[1])
        if read_as == "text" and text_column is not None:
            raise LowBitError(f"{key}.text_column={text_column!r}: {key}.data={source!r} is one text, no records")
        column = Column("text") if read_as == "text" else choose_column(head, text_column, source, key)
        if column.is_chat and not getattr(tokenizer, "chat_template", None):
            raise LowBitError(
                f"{key}.data={source!r} holds conversations (column {column.name}), but the tokenizer has no chat "
                f"template; set {key}.text_column to a column of plain text, or take a chat model's tokenizer"
            )
        apart = apart or column.is_chat
        documents, left_out = _documents(rows, column, tokenizer, samples if apart else None, characters)
    except LowBitError:
        raise
    except Exception as error:  # the library raises whatever its builders, the hub client and pyarrow raise
        raise LowBitError(f"{key}.data={source!r} cannot be loaded: {_reason(error)}") from None
    if not documents:
        why = f" (the chat template refuses all rows: {left_out[0]})" if left_out else ""
        raise LowBitError(f"{key}.data={source!r} holds no text{why}")
    nul = next((text for text in documents if "\0" in text), None)
    if nul is not None:
        raise LowBitError(f"{key}.data={source!r} holds NUL characters ({shown(nul[:20])}): it is no text in UTF-8")
    about = {
        "source": source,
        "read_as": "chat template" if column.is_chat else read_as,
        "column": None if read_as == "text" else column.name if wrapped is None else f"{wrapped[0]}.{column.name}",
        "documents": len(documents) if apart else 1,
        "left_out": len(left_out),
        "first": documents[0][:80],
    }
    return Texts(documents if apart else ["\n\n".join(documents)], apart, column.is_chat, about)


def check_source(source: str, key: str, ask_hub: bool = True) -> None:
    """Raise LowBitError for what is no source at a glance: a missing or empty file, an archive, zstandard missing, a
    dataset that the hub does not have."""
    path = Path(source)
    if source.startswith("stdlib:") or os.path.isdir(source):
        return
    if not os.path.isfile(source):
        if format_of(path) in (*RECORDS, "txt"):
            raise LowBitError(f"{key}.data: file {shown(source)} does not exist")
        name = source.partition(":")[0]
        if not os.path.isdir(name) and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
            raise LowBitError(f"{key}.data: file or folder {shown(name)} does not exist")
        if ask_hub:
            check_on_hub(name, "dataset", f"{key}.data")
        return
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise LowBitError(f"{key}.data: cannot read {source!r}: {error.strerror}") from None
    if not start:
        raise LowBitError(f"{key}.data: file {source!r} is empty")
    for kind, magic in _ARCHIVES.items():
        if start.startswith(magic):
            raise LowBitError(f"{key}.data={source!r} is a {kind} archive; unpack it and name a file of it")
    if start.startswith(_COMPRESSED["zst"]) and find_spec("zstandard") is None:
        raise LowBitError(
            f"{key}.data={source!r} is compressed with zstandard; pip install zstandard, or unpack it with unzstd"
        )


def format_of(path: Path) -> str:
    """Return the suffix that says what a file holds, without that of its compression."""
    suffixes = [suffix.lower().removeprefix(".") for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_rows(source: str, key: str) -> tuple[Iterable[dict[str, Any]], str, bool]:
    """Return (rows, what they are read as, whether each stays apart)."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    if path.is_file():
        kind = format_of(path)
        options: dict[str, Any] = {"data_files": glob.escape(str(path)), "split": "train"}
        builder = RECORDS.get(kind, "text")
        if builder in ("json", "csv", "text"):
            options["encoding"] = _encoding(path)
        if kind == "tsv":
            options["sep"] = "\t"
        if builder == "text":
            options["sample_by"] = "document"
        return datasets.load_dataset(builder, **options), builder, builder != "text"
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    if path.is_dir():
        name, config, split = source, "", ""
    split = split or ("test" if key == "evaluation" else "train")
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(name)
        if split not in splits:
            listed = ", ".join(splits)
            raise LowBitError(f"{key}.data={source!r} has no split {split!r}; choose one of {listed}: {name}::SPLIT")
        return splits[split], "dataset", False
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return datasets.load_from_disk(name), "dataset", False
    return datasets.load_dataset(name, config or None, split=split, streaming=True), "dataset", False


def _encoding(path: Path) -> str:
    """Return UTF-8, or what the byte order mark at the start of the (unpacked) file says."""
    import fsspec

    with path.open("rb") as file:
        start = file.read(8)
    kind = next((kind for kind, magic in _COMPRESSED.items() if start.startswith(magic)), None)
    compression = {"gz": "gzip", "zst": "zstd"}.get(kind or "", kind)
    with fsspec.open(str(path), "rb", compression=compression) as opened:
        start = opened.read(4)
    return next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), "utf-8")


def _peek(
    rows: Iterable[dict[str, Any]], text_column: str | None
) -> tuple[list[dict[str, Any]], Iterator[dict[str, Any]]]:
    """Return (the first rows, all rows): HEAD of them, and as many more as every value of a wanted column is null
    in."""
    iterator, head = iter(rows), []
    for row in islice(iterator, _FURTHEST):
        head.append(row)
        if len(head) >= HEAD and enough_rows(head[-HEAD:], text_column):
            break
    return head, chain(head, iterator)


def _documents(
    rows: Iterator[dict[str, Any]], column: Column, tokenizer: Any, most: int | None, characters: int
) -> tuple[list[str], list[str]]:
    """Return (texts that are not blank, why rows were left out): `most` texts, or as many as hold enough characters."""
    texts: list[str] = []
    left_out: list[str] = []
    read = own = 0  # characters of all columns, and of this one: a row's other columns may be the longer ones
    for row in rows:
        try:
            text = column.text(row, tokenizer)
        except Exception as error:  # a template's own: a role it does not know, an order it does not take
            if not column.is_chat:
                raise
            left_out.append(one_line(error))
            continue
        if text and text.strip():
            texts.append(text)
        read += sum(len(value) for value in row.values() if isinstance(value, str))
        own += len(text or "")
        if len(texts) == most or (most is None and read >= characters and own >= characters // 8):
            break
    return texts, left_out


def _reason(error: BaseException) -> str:
    """Return one line of an error and, for bytes that are not UTF-8, what to do."""
    causes: BaseException | None = error
    while causes is not None:
        if isinstance(causes, UnicodeDecodeError):
            return f"{one_line(causes)}; it is not UTF-8: convert it, as with iconv -f WINDOWS-1252 -t UTF-8"
        causes = causes.__cause__ or causes.__context__
    return one_line(error.__cause__ or error)
