"""gptq: sources against the loaders that the papers' perplexities come from, written down in a few lines each."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path

import pytest
import torch
from commands import run_here
from tiny_models import embedded_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_lowbit.config import EvaluationConfig, LowBitError
from megatron_lowbit.io.data import token_windows

# Rows of a dataset, as WikiText-2's: a heading, lines without a word, no line break at the end of the file.
ROWS = [
    " \n",
    " = Robert Boulter = \n",
    "\n",
    " Robert Boulter is\u2028English . \n",
    " He had a role in 2000 .",
]


class Characters:
    """A token is a character; 1 begins a text."""

    bos_token_id = 1

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(ord, text)]}


def windows(source: str, length: int, samples: int = 4096) -> list[list[int]]:
    found = token_windows(Characters(), source, samples, length, 10_000, "evaluation")
    assert found.mask.all()
    return found.ids.tolist()


@pytest.fixture
def wiki(tmp_path) -> Path:
    (tmp_path / "wiki.test.raw").write_text("".join(ROWS))
    return tmp_path / "wiki.test.raw"


def test_wikitext2(wiki, tmp_path):
    rows = [row if row.strip() else "" for row in ROWS]  # as the hub has them
    ids = Characters()("\n\n".join(rows))["input_ids"]
    expected = [ids[i * 7 : (i + 1) * 7] for i in range(len(ids) // 7)]
    assert windows(f"gptq:wikitext2:{wiki}", 7) == expected
    records = tmp_path / "test.jsonl"
    records.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert windows(f"gptq:wikitext2:{records}", 7) == expected
    assert [window[0] for window in expected].count(1) == 1, "one beginning-of-text token, at the very first place"
    assert windows(f"gptq:wikitext2:{wiki}", 7, samples=3) == [expected[i * len(expected) // 3] for i in range(3)]


def test_ptb(tmp_path):
    (tmp_path / "ptb.valid.txt").write_text(" consumers may want <unk> \n a rally that N \n")
    ids = Characters()("consumers may want <unk>\n\na rally that N")["input_ids"]
    assert windows(f"gptq:ptb:{tmp_path / 'ptb.valid.txt'}", 10) == [ids[i : i + 10] for i in range(0, 40, 10)]


def test_c4(tmp_path):
    texts = ["x" * (5 * n) + chr(97 + n) * 9 for n in range(12)]
    (tmp_path / "c4.jsonl").write_text("".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in texts))
    random.seed(0)
    expected = []
    for _ in range(256):
        while True:
            i = random.randint(0, len(texts) - 1)
            ids = Characters()(texts[i])["input_ids"]
            if len(ids) >= 31:
                break
        i = random.randint(0, len(ids) - 31 - 1)
        expected.append(ids[i : i + 31])
    assert windows(f"gptq:c4:{tmp_path / 'c4.jsonl'}", 31) == expected


def test_the_perplexity_is_the_papers(wiki, tmp_path):
    """exp(sum of seqlen * mean loss of a window / (windows * seqlen)), as their loop over the windows has it."""
    wiki.write_text("".join(ROWS * 8))
    command = ["evaluate", "model=embedded", "dtype=float32", f"evaluation.data=gptq:wikitext2:{wiki}"]
    assert run_here(*command, "evaluation.sequence_length=64", f"output_dir={tmp_path}") == 0
    (row,) = json.loads((tmp_path / "evaluate.json").read_text())["rows"]
    model = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    rows = [row if row.strip() else "" for row in io.StringIO(wiki.read_text())]
    ids = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids
    count, losses = ids.numel() // 64, []
    for i in range(count):
        window = ids[:, i * 64 : (i + 1) * 64]
        with torch.no_grad():
            logits = model(window).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]).item() * 64)
    assert count > 3
    assert row["perplexity"] == pytest.approx(math.exp(sum(losses) / (count * 64)), rel=1e-5)


def test_all_windows_of_2048_tokens_unless_said_otherwise():
    section = EvaluationConfig(data="gptq:wikitext2")
    assert section.sequence_length == 2048 and section.samples > 400
    assert EvaluationConfig(data="gptq:c4", samples=3, sequence_length=512).sequence_length == 512
    assert EvaluationConfig(**section.model_dump()) == section, "a saved config means the same"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("gptq:wikitext", "is not one of gptq:wikitext2, gptq:ptb:FILE, gptq:c4"),
        ("gptq:ptb", "needs a file"),
        ("gptq:wikitext2:nowhere.raw", "file 'nowhere.raw' does not exist"),
        ("gptq:wikitext2:{short}", "it has no window of 50 tokens"),
        ("gptq:c4:{short}", "it has no window of 50 tokens"),
        ("gptq:ptb:{records}", "has no column 'sentence'"),
    ],
)
def test_bad_sources(source, says, tmp_path):
    (tmp_path / "short").write_text("few words\n")
    (tmp_path / "records.jsonl").write_text('{"text": "few words"}\n')
    source = source.format(short=tmp_path / "short", records=tmp_path / "records.jsonl")
    with pytest.raises(LowBitError, match=says):
        windows(source, 50)


def test_calibration_takes_other_text():
    with pytest.raises(LowBitError, match="calibration takes other text"):
        token_windows(Characters(), "gptq:wikitext2", 4, 8, 100, "calibration")
