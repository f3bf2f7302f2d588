"""Token windows: which tokens of a text they hold, and which sources are refused. A token here is a character."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch

from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.data import Windows, stdlib_text, token_windows

datasets = pytest.importorskip("datasets")

# 1000 different characters, so that every window shows where it was cut.
TEXT = "".join(chr(0x4E00 + i) for i in range(1000))


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tokenize(text: str, verbose: bool = True) -> dict[str, list[int]]:
    assert not verbose  # or real tokenizers warn that a whole text is longer than the context
    return {"input_ids": [ord(character) for character in text]}


def windows_of(source: object, samples: int = 4, length: int | None = 5, context: int = 100) -> Windows:
    windows = token_windows(tokenize, str(source), samples, length, context, "calibration")
    assert windows.ids.dtype == torch.int64 and windows.mask.dtype == torch.bool
    assert windows.ids.shape == windows.mask.shape
    assert not windows.ids[~windows.mask].any()  # padding is 0
    return windows


def texts(windows: Windows) -> list[str]:
    return ["".join(map(chr, ids[mask])) for ids, mask in zip(windows.ids, windows.mask, strict=True)]


def refused(source: object, **options: object) -> str:
    with pytest.raises(LowBitError) as raised:
        windows_of(source, **options)
    message = str(raised.value)
    assert "\n" not in message and message.startswith("calibration.")
    return message


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


# --- One long text


@pytest.mark.parametrize(
    ("length", "samples", "starts"),
    [
        (5, 4, [0, 50, 100, 150]),  # 200 windows
        (100, 4, [0, 2, 5, 7]),  # 10 windows: every 2.5th
        (100, 10, range(10)),
        (100, 99, range(10)),  # more than there are: all of them
        (1000, 3, [0]),
        (300, 3, [0, 1, 2]),  # 100 characters at the end fill no window
        (300, 2, [0, 1]),
    ],
)
def test_windows_of_a_text_are_evenly_spaced(tmp_path, length, samples, starts):
    file = tmp_path / "long.txt"
    file.write_text(TEXT)
    windows = windows_of(file, samples, length, context=2000)
    assert texts(windows) == [TEXT[start * length : (start + 1) * length] for start in starts]
    assert windows.mask.all()


@pytest.mark.parametrize(("context", "expected"), [(64, 64), (2048, 2048), (5000, 2048)])
def test_default_length_is_the_context_at_most_2048(tmp_path, context, expected):
    file = tmp_path / "long.txt"
    file.write_text(TEXT * 6)
    assert windows_of(file, length=None, context=context).ids.shape[1] == expected


def test_a_text_is_one_document(tmp_path):
    """Blank lines, white space at the ends and a name without .txt do not divide or change it."""
    content = " first line\n\n\nsecond\tline \n"
    for name in ("text.txt", "text.TXT", "text.md"):
        (tmp_path / name).write_text(content)
        assert texts(windows_of(tmp_path / name, length=None)) == [content]


def test_an_edited_file_is_read_again(tmp_path):
    file = tmp_path / "text.txt"
    for content in ("before", "later!"):
        file.write_text(content)
        assert texts(windows_of(file, length=6)) == [content]


def test_a_short_text_is_one_window_unless_a_length_is_asked_for(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("abcdefg")
    assert texts(windows_of(file, length=None)) == ["abcdefg"]
    assert texts(windows_of(file, length=7)) == ["abcdefg"]
    message = refused(file, length=8)
    assert "is too short: 7 tokens, 8 are one window" in message and "calibration.sequence_length" in message


# --- Documents


def test_json_list_of_strings(tmp_path):
    file = tmp_path / "docs.json"
    file.write_text(json.dumps(["hello", "hi", "a longer one", "ok"]))
    windows = windows_of(file, samples=3, length=6)
    assert texts(windows) == ["hello", "hi", "a long"]  # the first three, cut at six tokens
    assert windows.ids.shape == (3, 6) and windows.num_tokens == 5 + 2 + 6


def test_jsonl_text_column(tmp_path):
    rows = [{"id": "one", "text": "hello"}, {"id": "two", "text": None}, {"id": "three", "text": "bye"}]
    assert texts(windows_of(write(tmp_path / "a.jsonl", *rows))) == ["hello", "bye"]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    assert texts(windows_of(tmp_path / "b.json")) == ["hello", "bye"]


def test_jsonl_other_column_name(tmp_path):
    file = write(tmp_path / "docs.jsonl", {"number": 1, "body": "hello"}, {"number": 2, "body": " \n"})
    assert texts(windows_of(file)) == ["hello"]  # white space is no document


def test_documents_of_one_token_are_left_out(tmp_path):
    file = write(tmp_path / "docs.jsonl", {"text": "a"}, {"text": "bc"})
    assert texts(windows_of(file)) == ["bc"]
    assert "no document has two tokens" in refused(write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}))


# --- Refused


@pytest.mark.parametrize("name", ["text.txt", "docs.json", "docs.jsonl", "sub/text.txt"])
def test_missing_file(tmp_path, name):
    assert refused(tmp_path / name) == f"calibration.data: file '{tmp_path / name}' does not exist"


@pytest.mark.parametrize("name", ["text.txt", "docs.json", "docs.jsonl"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).write_text("")
    assert refused(tmp_path / name) == f"calibration.data: file '{tmp_path / name}' is empty"


def test_only_white_space(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n")
    assert "holds no text" in refused(tmp_path / "blank.txt")
    assert "holds no text" in refused(write(tmp_path / "blank.jsonl", {"text": " "}, {"text": ""}))


def test_no_text_column(tmp_path):
    file = write(tmp_path / "numbers.jsonl", {"a": 1, "b": 2.5}, {"a": 2, "b": 3.5})
    assert "has no text column (columns: a, b)" in refused(file)


@pytest.mark.parametrize(("name", "content"), [("docs.jsonl", b'{"text": "abc"'), ("text.txt", b"abc\xff\xfe")])
def test_unreadable_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert "cannot be loaded: " in refused(tmp_path / name)


def test_length_beyond_the_context(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    message = "calibration.sequence_length=101 is beyond the model's context of 100 tokens"
    assert refused(tmp_path / "text.txt", length=101) == message
    windows_of(tmp_path / "text.txt", length=100)


def test_the_error_names_its_section(tmp_path):
    with pytest.raises(LowBitError, match=r"^evaluation\.data: file"):
        token_windows(tokenize, str(tmp_path / "no.txt"), 1, None, 100, "evaluation")


# --- Batches


def test_batches_are_cut_to_their_longest_window():
    lengths = torch.tensor([2, 5, 3, 4, 1])
    mask = torch.arange(5) < lengths[:, None]
    ids = torch.arange(25).view(5, 5) * mask
    windows = Windows(ids, mask)
    batches = list(windows.batches(2))
    assert [tuple(batch.shape) for batch, _ in batches] == [(2, 5), (2, 4), (1, 1)]
    assert windows.num_batches(2) == len(batches) and windows.num_tokens == 15
    for start, (batch, real) in zip((0, 2, 4), batches, strict=True):
        width = batch.shape[1]
        assert torch.equal(batch, ids[start : start + 2, :width])
        assert torch.equal(real, mask[start : start + 2, :width])
    assert windows.num_batches(5) == windows.num_batches(9) == 1 and windows.num_batches(1) == 5


# --- The standard library

STDLIB = Path(sysconfig.get_path("stdlib"))
VALIDATION = ["argparse", "calendar", "configparser", "csv", "difflib", "fractions", "heapq", "shutil", "statistics"]
VALIDATION += ["textwrap"]


@pytest.fixture(scope="module")
def train_text() -> str:
    return stdlib_text("train")


@pytest.mark.parametrize("name", VALIDATION)
def test_validation_modules_are_never_trained_on(train_text, name):
    source = (STDLIB / f"{name}.py").read_text(encoding="utf-8")
    assert source in stdlib_text("validation")
    assert source not in train_text and source not in stdlib_text("calibration")
    # Nor is a large part of it, under another name: no run of 20 lines from its middle.
    lines = source.splitlines()
    middle = len(lines) // 2
    assert "\n".join(lines[middle : middle + 20]) not in train_text


def test_calibration_is_part_of_training(train_text):
    for name in ("ast", "typing", "tarfile"):
        source = (STDLIB / f"{name}.py").read_text(encoding="utf-8", errors="ignore")
        assert source in stdlib_text("calibration") and source in train_text


def test_training_leaves_out_installed_packages(train_text):
    assert (STDLIB / "json" / "decoder.py").read_text() in train_text
    assert Path(pytest.__file__).read_text() not in train_text


def test_stdlib_windows():
    windows = windows_of("stdlib:validation", samples=3, length=8)
    text = stdlib_text("validation")
    assert texts(windows)[0] == text[:8] and all(window in text for window in texts(windows))


def test_unknown_stdlib_split():
    with pytest.raises(LowBitError, match="stdlib:test is not one of stdlib:train, stdlib:calibration, "):
        windows_of("stdlib:test")


# --- The beginning-of-text token, and the hub


class StartingTokenizer:
    """A tokenizer that starts every text with a token of its own."""

    bos_token_id = 7

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.bos_token_id, *tokenize(text, verbose)["input_ids"]]}


def test_every_window_starts_as_a_prompt_does(tmp_path):
    (tmp_path / "long.txt").write_text(TEXT)
    windows = token_windows(StartingTokenizer(), str(tmp_path / "long.txt"), 3, 5, 100, "calibration")
    assert windows.ids[:, 0].tolist() == [7, 7, 7]
    # 250 windows of 4 characters; windows 0, 83 and 166 of them.
    assert ["".join(map(chr, ids[1:])) for ids in windows.ids] == [TEXT[i : i + 4] for i in (0, 332, 664)]


def joined(text: str) -> str:
    """Its rows of 100 characters with a blank line between them."""
    return "\n\n".join(text[i : i + 100] for i in range(0, len(text), 100))


def test_a_dataset_is_read_no_further_than_needed(tmp_path):
    """A folder stands for a hub dataset: the same loader streams both."""
    write(tmp_path / "train.jsonl", *({"text": TEXT[i : i + 100]} for i in range(0, 1000, 100)))
    write(tmp_path / "test.jsonl", {"text": TEXT[::-1]})
    # 10 windows of 5 tokens need at most 800 characters: 8 rows, 814 characters joined, 162 windows.
    assert texts(windows_of(tmp_path, samples=10))[-1] == joined(TEXT)[9 * 162 // 10 * 5 :][:5]
    one = token_windows(tokenize, str(tmp_path), 1, 5, 100, "calibration")
    assert texts(one) == [TEXT[:5]]
    held_out = token_windows(tokenize, str(tmp_path), 1, 5, 100, "evaluation")
    assert texts(held_out) == [TEXT[::-1][:5]]
    named = token_windows(tokenize, f"{tmp_path}::test", 1, 5, 100, "calibration")
    assert texts(named) == texts(held_out)
    assert "cannot be loaded" in refused(f"{tmp_path}::nowhere")
