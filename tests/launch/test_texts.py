"""What is read of files and datasets: every format, the column, conversations. Expected texts are written by hand."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pytest

from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.columns import choose_column
from megatron_lowbit.io.texts import Texts, check_source, read_texts

datasets = pytest.importorskip("datasets")

STORIES = ["Once upon a time.", "There was, however, an end."]
RECORDS = [{"id": f"row-{i}", "url": f"https://a.b/{'x' * 99}/{i}", "text": text} for i, text in enumerate(STORIES)]


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class Plain:
    chat_template = None


class Chat:
    """Writes <role>content for every message, and takes no role of another name."""

    chat_template = "there is one"

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        if any(message["role"] not in ("system", "user", "assistant") for message in messages):
            raise ValueError("unknown role")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def read(source: object, column: str | None = None, tokenizer: object = None, samples: int = 100, **options) -> Texts:
    options = {"key": "calibration", "characters": 10_000, **options}
    return read_texts(str(source), tokenizer=tokenizer or Plain(), samples=samples, text_column=column, **options)


def refused(source: object, *arguments: object, **options: object) -> str:
    with pytest.raises(LowBitError) as raised:
        read(source, *arguments, **options)
    message = str(raised.value)
    assert "\n" not in message and message.startswith("calibration.")
    return message


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[dict], delimiter: str) -> bytes:
    lines: list[str] = []
    writer = csv.DictWriter(type("", (), {"write": lines.append}), list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return "".join(lines).encode()


FORMS = {
    "jsonl": jsonl(RECORDS),
    "ndjson": jsonl(RECORDS),
    "json": json.dumps(RECORDS).encode(),
    "csv": table(RECORDS, ","),
    "tsv": table(RECORDS, "\t"),
}
PACKED = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


# --- Formats


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("form", FORMS)
def test_records(tmp_path, form, packing):
    file = tmp_path / ".".join(filter(None, ["data", form, packing]))
    file.write_bytes(PACKED[packing](FORMS[form]))
    texts = read(file)
    assert texts.documents == STORIES and texts.apart and not texts.special
    assert texts.about == {
        "source": str(file),
        "read_as": "csv" if form in ("csv", "tsv") else "json",
        "column": "text",
        "documents": 2,
        "left_out": 0,
        "first": STORIES[0],
    }


@pytest.mark.parametrize("packing", PACKED)
def test_one_text(tmp_path, packing):
    file = tmp_path / ".".join(filter(None, ["book", "txt", packing]))
    file.write_bytes(PACKED[packing](b" Chapter 1\n\n" + b"x" * 100))
    texts = read(file)
    assert texts.documents == [" Chapter 1\n\n" + "x" * 100] and not texts.apart
    assert (texts.about["column"], texts.about["first"]) == (None, " Chapter 1\n\n" + "x" * 68)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_tables_of_arrow(tmp_path, form):
    data = datasets.Dataset.from_list(RECORDS)
    if form == "parquet":
        data.to_parquet(tmp_path / "data.parquet")
    else:
        data.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "data.arrow")
    texts = read(tmp_path / f"data.{form}")
    assert texts.documents == STORIES and texts.apart


def test_a_folder_of_save_to_disk(tmp_path):
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "one")
    texts = read(tmp_path / "one")
    assert texts.documents == ["\n\n".join(STORIES)] and not texts.apart
    splits = {name: datasets.Dataset.from_list([{"text": name * 3}]) for name in ("train", "test", "more")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    assert read(tmp_path / "dict").documents == ["train" * 3]
    assert read(tmp_path / "dict", key="evaluation").documents == ["test" * 3]
    assert read(f"{tmp_path / 'dict'}::more").documents == ["more" * 3]
    assert "has no split 'no'; choose one of train, test, more" in refused(f"{tmp_path / 'dict'}::no")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("form", ["txt", "jsonl", "csv"])
def test_byte_order_marks(tmp_path, encoding, form):
    text = "Ein Märchen – 物語"
    rows = [{"text": text, "n": 1}]
    whole = {"txt": text, "jsonl": json.dumps(rows[0], ensure_ascii=False), "csv": table(rows, ",").decode()}[form]
    (tmp_path / f"data.{form}").write_bytes(whole.encode(encoding))
    assert read(tmp_path / f"data.{form}").documents == [text]


@pytest.mark.parametrize("form", ["txt", "jsonl", "csv"])
def test_another_encoding_is_told(tmp_path, form):
    (tmp_path / f"data.{form}").write_bytes('text\n{"text": "M\xe4rchen"}\n'.encode("latin-1"))
    message = refused(tmp_path / f"data.{form}")
    assert "cannot be loaded" in message and (
        form == "jsonl" or "it is not UTF-8: convert it, as with iconv" in message
    )


def test_utf_16_without_a_mark_is_no_text(tmp_path):
    (tmp_path / "data.txt").write_bytes("hello".encode("utf-16-le"))
    assert "holds NUL characters" in refused(tmp_path / "data.txt")


@pytest.mark.parametrize("name", ["a[1].jsonl", "b*.jsonl", "c d.jsonl", "é.jsonl"])
def test_names_are_no_patterns(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS["jsonl"])
    (tmp_path / "b1.jsonl").write_bytes(jsonl([{"text": "another"}]))
    assert read(tmp_path / name).documents == STORIES


@pytest.mark.parametrize(
    ("name", "start", "said"),
    [
        ("data.jsonl.zst", b"\x28\xb5\x2f\xfd", "pip install zstandard, or unpack it with unzstd"),
        ("data.zip", b"PK\x03\x04", "is a zip archive; unpack it"),
        ("data.txt", b"", "is empty"),
    ],
)
def test_what_cannot_be_unpacked(tmp_path, monkeypatch, name, start, said):
    monkeypatch.setattr("megatron_lowbit.io.texts.find_spec", lambda package: None)
    (tmp_path / name).write_bytes(start)
    with pytest.raises(LowBitError, match=said):
        check_source(str(tmp_path / name), "calibration")


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "data.jsonl.zst").write_bytes(zstandard.compress(FORMS["jsonl"]))
    assert read(tmp_path / "data.jsonl.zst").documents == STORIES


@pytest.mark.parametrize("name", ["/nowhere/folder", "./nowhere", "a/b/c", "/nowhere/x.csv.gz", "x.parquet"])
def test_what_is_not_there(name):
    with pytest.raises(LowBitError, match=r"calibration\.data: file( or folder)? '.*' does not exist"):
        check_source(name, "calibration")
    check_source("stdlib:calibration", "calibration")


# --- Columns

LONG = "many words " * 9


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"id": LONG, "text": "short"}, "text"),
        ({"url": LONG, "Text": "short"}, "Text"),
        ({"title": LONG, "content": "a"}, "content"),
        ({"id": 1, "document": "a", "summary": LONG}, "document"),
        ({"instruction": LONG, "text": "the whole of it"}, "text"),
        ({"a": "short", "b": LONG, "c": "short"}, "b"),  # no known name: most characters
        ({"doc_id": LONG, "image_url": LONG, "remark": "a b"}, "remark"),
        ({"text": 5, "content": "a"}, "content"),
        ({"messages": None, "text": "a"}, "text"),
    ],
)
def test_the_column_is_one_of_text(tmp_path, row, column):
    (tmp_path / "data.jsonl").write_bytes(jsonl([row, row]))
    texts = read(tmp_path / "data.jsonl")
    assert (texts.about["column"], texts.documents) == (column, [row[column]] * 2)


def test_names_that_are_no_text(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(jsonl([{"id": "a", "url": "b", "title": LONG, "n": 1}]))
    message = refused(tmp_path / "data.jsonl")
    assert "has no text column (columns: id, url, title, n); choose one with calibration.text_column" in message
    assert read(tmp_path / "data.jsonl", "title").documents == [LONG]


def test_a_column_that_is_asked_for(tmp_path):
    row = {"text": "a b", "other": "c d", "n": 3, "inner": {"en": "e f"}, "tags": ["x"]}
    (tmp_path / "data.jsonl").write_bytes(jsonl([row]))
    assert read(tmp_path / "data.jsonl", "other").documents == ["c d"]
    assert read(tmp_path / "data.jsonl", "inner.en").documents == ["e f"]
    assert "text_column='no' is no column of" in refused(tmp_path / "data.jsonl", "no")
    assert "text_column='n' of" in refused(tmp_path / "data.jsonl", "n")
    assert "holds ['x'], no text" in refused(tmp_path / "data.jsonl", "tags")
    (tmp_path / "a.txt").write_text("a b")
    assert "is one text, no records" in refused(tmp_path / "a.txt", "text")


def test_rows_of_null_before_the_first_text(tmp_path):
    rows = [{"id": f"row {i}", "text": None} for i in range(250)] + [{"id": "last", "text": "the text"}]
    (tmp_path / "data.jsonl").write_bytes(jsonl(rows))
    assert read(tmp_path / "data.jsonl").documents == ["the text"]
    folder = tmp_path / "streamed"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl(rows))
    assert read(folder).documents == ["the text"]


def test_a_stream_is_read_until_its_own_column_holds_enough(tmp_path):
    """1,000 characters are wanted; the other column has them in the first row, and is not what is read."""
    rows = [{"text": "word " * 4, "page": "x" * 1000} for _ in range(20)]
    (tmp_path / "train.jsonl").write_bytes(jsonl(rows))
    (text,) = read(tmp_path, characters=1000).documents
    assert 1000 // 8 <= len(text) < 1000


@pytest.mark.parametrize(
    "wrapped",
    [
        {"version": "1", "data": [{"text": text} for text in STORIES]},
        {"info": "a name", "rows": [{"id": "x", "text": text} for text in STORIES]},
        {"version": "1", "data": STORIES},
        {"text": STORIES},
    ],
)
def test_a_list_inside_one_object(tmp_path, wrapped):
    (tmp_path / "data.json").write_text(json.dumps(wrapped))
    assert read(tmp_path / "data.json").documents == STORIES


def test_one_record_is_no_wrapping(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps({"note": LONG, "tags": ["a", "b"]}))
    assert read(tmp_path / "data.json").documents == [LONG]


# --- Conversations

SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
WRITTEN = "<user>Hi<assistant>Hello"


@pytest.mark.parametrize(
    ("row", "column", "written"),
    [
        ({"prompt_id": "x", "messages": SAID}, "messages", WRITTEN),
        ({"id": "x", "conversations": SHARED}, "conversations", WRITTEN),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt+completion", WRITTEN),
        ({"prompt": SAID[:1], "completion": SAID[1:]}, "prompt+completion", WRITTEN),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "instruction+output", WRITTEN),
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, "instruction+output", "<user>Add\n\n1, 2<assistant>3"),
        (
            {"system_prompt": "Be brief", "question": "Hi", "response": "Hello"},
            "question+response",
            "<system>Be brief" + WRITTEN,
        ),
        ({"prompt": "Hi", "messages": SAID}, "messages", WRITTEN),
    ],
)
def test_conversations_are_written_by_the_template(tmp_path, row, column, written):
    (tmp_path / "data.jsonl").write_bytes(jsonl([row, row]))
    texts = read(tmp_path / "data.jsonl", tokenizer=Chat())
    assert texts.documents == [written] * 2 and texts.apart and texts.special
    assert (texts.about["read_as"], texts.about["column"]) == ("chat template", column)
    message = refused(tmp_path / "data.jsonl")
    assert f"holds conversations (column {column}), but the tokenizer has no chat template" in message


def test_one_side_of_a_conversation_can_be_asked_for(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(jsonl([{"instruction": "Hi", "output": "Hello"}]))
    assert read(tmp_path / "data.jsonl", "output").documents == ["Hello"]


def test_conversations_of_a_dataset_stay_apart(tmp_path):
    datasets.Dataset.from_list([{"messages": SAID}] * 5).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", tokenizer=Chat(), samples=3).documents == [WRITTEN] * 3


def test_rows_that_the_template_refuses(tmp_path):
    tool = [{"role": "tool", "content": "42"}]
    (tmp_path / "data.jsonl").write_bytes(jsonl([{"messages": tool}, {"messages": SAID}]))
    texts = read(tmp_path / "data.jsonl", tokenizer=Chat())
    assert texts.documents == [WRITTEN] and texts.about["left_out"] == 1
    (tmp_path / "data.jsonl").write_bytes(jsonl([{"messages": tool}]))
    assert "holds no text (the chat template refuses all rows: unknown role)" in refused(
        tmp_path / "data.jsonl", tokenizer=Chat()
    )


def test_no_rows():
    with pytest.raises(LowBitError, match=r"has no text column \(columns: no rows\)"):
        choose_column([], None, "x", "calibration")


def test_a_conversation_gets_no_second_first_token(tmp_path):
    """The template writes the tokenizer's special tokens; the windows have them once."""
    from megatron_lowbit.io.data import token_windows

    class Tokenizer(Chat):
        bos_token_id = 7

        def __call__(self, text: str, verbose: bool = True, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [7] * add_special_tokens + [ord(character) for character in text]}

    file, told = Path(tmp_path / "data.jsonl"), []
    file.write_bytes(jsonl([{"messages": SAID}]))
    windows = token_windows(Tokenizer(), str(file), 4, None, 100, "calibration", tell=told.append)
    assert "".join(map(chr, windows.ids[0])) == WRITTEN
    assert [about["windows"] for about in told] == [1]
