"""Bodies of completions with at least one thing wrong in them."""

from __future__ import annotations

import json
import random

JUNK = [None, True, -1, 1e999, 2**70, "", "\0", [], {}, [[]], [{}], [None], "x" * 5000, {"a": [1]}, -0.5, [1, "a"]]
WRONG = {
    "model": JUNK,
    "prompt": [value for value in JUNK if value not in ("\0", "x" * 5000)],
    "max_tokens": ["1", 1.5, -1, 2**70, [], {}, True, 10**6],
    "temperature": ["a", -1, 3, 1e999, [], {}, True],
    "top_p": ["a", -1, 3, 1e999, [], {}, True],
    "n": ["a", 0, 99, 1.5, [], {}, True, 2**70],
    "stop": [1, "", [1], [""], {}, True, ["a"] * 50],
    "seed": ["a", 1.5, 2**64, [], {}, True],
    "logprobs": ["a", -1, 100, 1.5, [], {}],
    "stream": ["a", 1, [], {}],
    "echo": ["a", 1, [], {}],
    "logit_bias": [{"5": 1}, [], 1, "a", True],
    "stream_options": [1, "a", [], {"a": 1}, {"include_usage": 1}],
}


def malformed(random_: random.Random, model: str) -> bytes:
    body = {"model": model, "prompt": "def", "max_tokens": 2, "temperature": 0.5, "top_p": 1.0, "n": 1}
    wrong = {**WRONG, "".join(random_.choices("abcxyz_\u00e9\u65e5", k=6)): JUNK}  # and a key that there is not
    for key in random_.sample(sorted(wrong), random_.randint(1, 3)):
        body[key] = random_.choice(wrong[key])
    text = json.dumps(body).replace("Infinity", "1e999").encode()
    if random_.random() < 0.3:  # and what is no JSON at all
        place = random_.randrange(1, len(text))
        cut = text[place:] if random_.random() < 0.5 else b""
        text = text[:place] + (bytes([random_.randrange(1, 32)]) + b'"' + cut if cut else b"")
    return text
