"""The text of a continuation: joined to its prompt's it is the text of both."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from megatron_lowbit.launch.text import Text, continuation

WORDS = ["<s>", "▁Once", "▁upon", "▁a", "▁time", ",", "<0xC3>", "<0x9F>"]


@pytest.fixture(scope="module")
def llama2():
    """Llama 2's decoder, which leaves out the first space of a text, and its tokens that are bytes."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_the_space_between_prompt_and_text(llama2):
    prompt, new = [0, 1, 2], [3, 4, 5, 6, 7, 4]  # "Once upon", " a time,ß time"
    whole = llama2.decode([*prompt, *new], skip_special_tokens=True)
    assert llama2.decode(new) == "a time,ß time", "decoded alone it lacks the space"
    assert llama2.decode(prompt, skip_special_tokens=True) + continuation(llama2, prompt, new) == whole
    assert continuation(llama2, [0], new) == continuation(llama2, [], new) == "a time,ß time"
    text = Text(llama2, prompt)
    assert "".join([*map(text.put, new), text.end()]) == " a time,ß time"
