"""The text of a continuation: joined to its prompt's it is the text of both, and its pieces are those of the whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import embedded_folder
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_lowbit.launch.text import Text, continuation

WORDS = ["<s>", "▁Once", "▁upon", "▁a", "▁time", ",", "<0xC3>", "<0x9F>"]
WORDS += ["</s>", "▁", "▁▁", "n", "日", "<0x0A>", "<0xE6>"]


def words(decoder: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def llama2():
    """Llama 2's decoder, which leaves out the first space of a text, and its tokens that are bytes."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return words(decoders.Sequence(steps))


@pytest.fixture(scope="module")
def tokenizers(llama2):
    """Llama 2's; one that leaves out all spaces of the first token; byte-level BPE, with parts of characters."""
    byte_level = AutoTokenizer.from_pretrained(embedded_folder())
    return {"llama2": llama2, "metaspace": words(decoders.Metaspace()), "bytes": byte_level}


def test_the_space_between_prompt_and_text(llama2):
    prompt, new = [0, 1, 2], [3, 4, 5, 6, 7, 4]  # "Once upon", " a time,ß time"
    whole = llama2.decode([*prompt, *new], skip_special_tokens=True)
    assert llama2.decode(new) == "a time,ß time", "decoded alone it lacks the space"
    assert llama2.decode(prompt, skip_special_tokens=True) + continuation(llama2, prompt, new) == whole
    assert continuation(llama2, [0], new) == continuation(llama2, [], new) == "a time,ß time"
    text = Text(llama2, prompt)
    assert "".join([*map(text.put, new), text.end()]) == " a time,ß time"


def drawn(random_: random.Random, tokenizer: Any, name: str) -> list[int]:
    """Random tokens; of byte-level BPE half of them are parts of characters."""
    if name != "bytes":
        return random_.choices(range(len(WORDS)), k=random_.randint(1, 40))
    parts = [token for character in "ß日😀" for token in tokenizer(character, add_special_tokens=False)["input_ids"]]
    return [random_.choice(parts if random_.random() < 0.5 else range(1024)) for _ in range(random_.randint(1, 40))]


@pytest.mark.parametrize("name", ["llama2", "metaspace", "bytes"])
def test_pieces_are_those_of_the_whole_text(tokenizers, name):
    """Random tokens: byte runs that are broken off, special tokens, spaces alone. No piece is taken back."""
    tokenizer, random_, texts = tokenizers[name], random.Random(0), set()
    for _ in range(400):
        tokens = drawn(random_, tokenizer, name)
        split = random_.randint(0, min(2, len(tokens)))
        whole, text, said = continuation(tokenizer, tokens[:split], tokens[split:]), Text(tokenizer, tokens[:split]), ""
        for token in tokens[split:]:
            said += text.put(token)
            assert whole.startswith(said), (tokens, split)
        assert said + text.end() == whole, (tokens, split)
        texts.add(whole)
    assert len(texts) > 300 and any("\ufffd" in text for text in texts) == (name != "metaspace")


@pytest.mark.parametrize("name", ["llama2", "metaspace", "bytes"])
def test_stop_strings_of_the_whole_text(tokenizers, name):
    """The first that stands in the text of the tokens so far ends it, as when all of them are decoded every time."""
    tokenizer, random_, stopped = tokenizers[name], random.Random(1), 0
    for _ in range(200):
        tokens = drawn(random_, tokenizer, name)
        if not (whole := continuation(tokenizer, [], tokens)):
            continue  # special tokens alone
        places = [random_.randrange(len(whole)) for _ in range(2)]
        stops = [whole[place : place + random_.randint(1, 4)] for place in places] + ["never there"]
        texts = [continuation(tokenizer, [], tokens[: n + 1]) for n in range(len(tokens))]
        number = next((n for n, text in enumerate(texts) if any(stop in text for stop in stops)), None)
        want = whole if number is None else texts[number][: min(f for s in stops if (f := texts[number].find(s)) >= 0)]
        text, said = Text(tokenizer, [], stops), ""
        for token in tokens:
            said += text.put(token)
            if text.stopped:
                break
        assert text.stopped == (number is not None) and text.length == (len(tokens) if number is None else number + 1)
        assert said + text.end() == want
        stopped += text.stopped
    assert stopped > 100


def test_the_work_grows_with_the_length(llama2, monkeypatch):
    """Twice the tokens, twice the tokens that are decoded, and no more than some for each."""
    seen: list[int] = []
    decode: Callable[..., str] = llama2.decode

    def counted(tokens, **options):
        seen.append(len(tokens))
        return decode(tokens, **options)

    monkeypatch.setattr(llama2, "decode", counted)
    work = []
    for count in (200, 400):
        seen.clear()
        text = Text(llama2, [1])
        for token in [2, 3, 4, 5, 6, 7, 13, 4] * (count // 8):
            text.put(token)
        work.append(sum(seen))
    assert work[1] < 2.05 * work[0] and work[1] < 400 * 8
