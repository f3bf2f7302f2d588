"""Megatron-Core's inference engines, static and dynamic, against transformers' greedy decoding."""

from __future__ import annotations

import random
from collections.abc import Sequence

import megatron_inference_cases as cases
import pytest
import torch
from commands import needs_megatron
from megatron_artifacts import quantize_embedded
from slow_cases import slow, slow_but
from tiny_models import VOCAB, build, embedded_folder, make_artifact
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatron_lowbit as lowbit
from megatron_lowbit.artifact import Artifact

pytestmark = needs_megatron

TINY = cases.TINY
STATIC, DYNAMIC = {"batching": "static"}, {"batching": "dynamic"}
BOTH = {"static": STATIC, "dynamic": DYNAMIC}


@pytest.fixture(scope="module")
def pools(one_rank, two_ranks, four_ranks):
    return {1: one_rank, 2: two_ranks, 4: four_ranks}


def prompts(lengths: Sequence[int], seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def by_transformers(
    model, many: list[list[int]], new_tokens: int, end_id: int | list[int] | None = None
) -> list[list[int]]:
    """Greedy continuations, one prompt at a time."""
    made = []
    for prompt in many:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": end_id}
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options
        )
        made.append(output[0, len(prompt) :].tolist())
    return made


def asked(many: list[list[int]], new_tokens: int) -> list[tuple[list[int], int]]:
    return [(prompt, new_tokens) for prompt in many]


def only(outcomes: list[dict]) -> dict:
    """What all ranks agree on."""
    assert all(outcome == outcomes[0] for outcome in outcomes), "the ranks made different tokens"
    return outcomes[0]


LENGTHS = [3, 5, 9, 4, 12, 1]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["full precision", "W4A4", "W4A8 + hybrid"])
def test_greedy_tokens_are_those_of_transformers(pools, kind, ranks):
    """Until the end of the text: that is a token which transformers makes in the middle of some continuations."""
    hf, many = build("llama"), prompts(LENGTHS)
    artifact = None
    if kind != "full precision":
        artifact = make_artifact(hf, kind.split()[0], (ranks,) if "hybrid" in kind and ranks > 1 else ())
        lowbit.apply_to_huggingface(hf, artifact, ranks)
    free = by_transformers(hf, many, 10)
    end_id = free[0][4]
    expected = by_transformers(hf, many, 10, end_id)
    assert len(expected[0]) <= 5 and expected[0][-1] == end_id and {len(new) for new in expected} > {10}
    runs = {f"{name}, free": (asked(many, 10), {**how, "max_batch": 4}) for name, how in BOTH.items()}
    runs |= {name: (asked(many, 10), {**how, "max_batch": 4, "end_id": end_id}) for name, how in BOTH.items()}
    made = only(pools[ranks].run(cases.generated, TINY, artifact, runs))
    for name, (tokens, told) in made.items():
        assert tokens == (free if "free" in name else expected), name
        assert told_in_turn(told, len(many)) == tokens, "on_token was told something else"


def test_yarn_scales_what_the_engines_turn(two_ranks):
    """Queries and keys also in the cache, whose contexts before 0.19 leave them as they are."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    changes = {"rope_parameters": {**rope, "attention_factor": 2.0}}
    many = prompts(LENGTHS)
    expected = by_transformers(build("llama", **changes), many, 10)
    unscaled = build("llama", rope_parameters={**rope, "attention_factor": 1.0})
    assert by_transformers(unscaled, many, 10) != expected, "the case shows nothing"
    runs = {name: (asked(many, 10), {**how, "max_batch": 4}) for name, how in BOTH.items()}
    for name, (tokens, _) in only(two_ranks.run(cases.generated, ("llama", changes), None, runs)).items():
        assert tokens == expected, name


def test_any_of_several_tokens_ends_a_text(two_ranks):
    """As in Llama 3.1, whose config has three: here the first of them never comes, and the others end different
    requests. Transformers takes the same list."""
    hf, many = build("llama"), prompts(LENGTHS)
    free = by_transformers(hf, many, 10)
    never = next(token for token in range(VOCAB) if not any(token in new for new in free))
    ends = [never, free[0][4], free[1][2]]
    expected = by_transformers(hf, many, 10, ends)
    assert {new[-1] for new in expected if len(new) < 10} >= set(ends[1:]), "the case shows nothing"
    runs = {name: (asked(many, 10), {**how, "max_batch": 4, "end_id": ends}) for name, how in BOTH.items()}
    made = only(two_ranks.run(cases.generated, TINY, None, runs))
    for name, (tokens, told) in made.items():
        assert tokens == expected and told_in_turn(told, len(many)) == tokens, name


def test_the_ends_are_those_of_transformers(tmp_path):
    """generation_config.json decides; the model's config where there is none."""
    from megatron_lowbit.launch.engines.megatron import end_id

    hf = build("llama", eos_token_id=[2, 7, 9])
    hf.save_pretrained(tmp_path)
    assert end_id(tmp_path, hf.config) == [2, 7, 9]
    hf.generation_config.eos_token_id = [3, 4]
    hf.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert end_id(tmp_path, hf.config) == loaded.generation_config.eos_token_id == [3, 4]
    (tmp_path / "generation_config.json").unlink()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert end_id(tmp_path, hf.config) == loaded.generation_config.eos_token_id == [2, 7, 9]


def test_ranks_that_share_a_kv_head(two_ranks):
    """One KV head for both ranks: the static engine keeps a copy on each, the dynamic one says that it cannot."""
    changes = {"num_key_value_heads": 1}
    hf, many = build("llama", **changes), prompts(LENGTHS)
    artifact = make_artifact(hf, "W4A8", (2,))
    expected = by_transformers(lowbit.apply_to_huggingface(hf, artifact, 2), many, 10)
    runs = {"static": (asked(many, 10), {**STATIC, "max_batch": 4})}
    made = only(two_ranks.run(cases.generated, ("llama", changes), artifact, runs))
    assert made["static"][0] == expected
    for outcome in two_ranks.run(cases.refused, ("llama", changes), {"": (asked(many, 4), DYNAMIC)}, False, STATIC):
        line, tokens = outcome[""]
        assert "1 KV heads on tp=2" in line and "batching=static" in line and tokens == 0


def told_in_turn(told: list[tuple[int, int]], count: int) -> list[list[int]]:
    streams: list[list[int]] = [[] for _ in range(count)]
    for number, token in told:
        streams[number].append(token)
    return streams


def test_tokens_are_told_as_they_come(one_rank):
    """Requests in flight take turns, and the third starts when one of two has ended; nothing waits for the end."""
    requests = list(zip(prompts([4, 6, 5]), [2, 6, 3], strict=True))
    (made,) = one_rank.run(cases.generated, TINY, None, {"": (requests, {**DYNAMIC, "max_batch": 2})})
    numbers = [number for number, _ in made[""][1]]
    assert numbers[:4] == [0, 1, 0, 1] and sorted(numbers) == [0] * 2 + [1] * 6 + [2] * 3
    assert numbers.index(2) > max(i for i, number in enumerate(numbers) if number == 0)
    assert numbers.index(2) < max(i for i, number in enumerate(numbers) if number == 1), "2 waited for 1"


# Artifacts with all there is


@pytest.fixture(scope="module")
def qllm(tmp_path_factory):
    """(artifact folder, prompts, {virtual ranks: transformers' tokens}).

    Not with reassembly before o_proj: there the first token's attention is its own quantized V, of which a channel
    split in two lies exactly between two codes, and the last bit of any sum decides.
    """
    folder = quantize_embedded(tmp_path_factory.mktemp("qllm"), **{"reassembly.o_proj": "false"})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["def read_lines(path):\n", "import os\n", "class Queue:\n    def", "for i in range(", "x = "]
    many, expected = [tokenizer(text)["input_ids"] for text in texts], {}
    for ranks in (1, 2):
        hf = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
        lowbit.apply_to_huggingface(hf, folder, ranks)
        expected[ranks] = by_transformers(hf, many, 16)
    return folder, many, expected


@pytest.mark.parametrize("ranks", [slow(1), 2])
def test_an_artifact_of_qllm_with_quantized_attention(pools, qllm, ranks):
    """Transformers keeps K and V packed in its cache, the static engine rounds all of them again at every token, and
    the dynamic one once, on their way into its pages."""
    folder, many, expected = qllm
    runs = {name: (asked(many, 16), how) for name, how in BOTH.items()}
    for name, (tokens, _) in only(pools[ranks].run(cases.generated, embedded_folder(), folder, runs)).items():
        assert tokens == expected[ranks], name
    assert expected[1] != expected[2], "the plan of two ranks was without effect"


@pytest.mark.parametrize("batching", slow_but(["dynamic"], BOTH))
def test_what_else_is_in_the_batch_does_not_matter(two_ranks, qllm, batching):
    """Static ranges and scales per token: a prompt alone gets the tokens that it gets among seven others."""
    folder, many, _ = qllm
    others = prompts([3, 17, 8, 20, 2, 11, 5], vocab=1024)
    runs = {"alone": (asked(many[:1], 10), BOTH[batching])}
    for place in (0, 5):
        batch = [*others[:place], many[0], *others[place:]]
        runs[str(place)] = asked(batch, 10), {**BOTH[batching], "max_batch": 8}
    made = only(two_ranks.run(cases.generated, embedded_folder(), folder, runs))
    for place in (0, 5):
        assert made[str(place)][0][place] == made["alone"][0][0], place


@pytest.mark.parametrize("batching", BOTH)
def test_sixteen_at_once(two_ranks, batching):
    """Against transformers, one by one: prompts of other lengths neither see nor shift each other."""
    hf = build("llama")
    artifact = make_artifact(hf, "W4A8", (2,))
    lowbit.apply_to_huggingface(hf, artifact, 2)
    many = prompts(random.Random(0).sample(range(1, 40), 16), seed=1)
    run = asked(many, 8), {**BOTH[batching], "max_batch": 16}
    made = only(two_ranks.run(cases.generated, TINY, artifact, {"": run}))
    assert made[""][0] == by_transformers(hf, many, 8)


def test_two_hundred_in_a_queue(one_rank):
    """Lengths and numbers of new tokens at random, at most eight at once: none is lost, none gets another's tokens.

    Transformers continues all prompts of one length together, and is cut to what each asked for.
    """
    draw = random.Random(0)
    requests = [(prompt, draw.randint(1, 10)) for prompt in prompts([draw.randint(1, 20) for _ in range(200)], seed=2)]
    hf, expected = build("llama"), {}
    for length in range(1, 21):
        same = [prompt for prompt, _ in requests if len(prompt) == length]
        ids = torch.tensor(same)
        output = hf.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        expected |= {tuple(prompt): new for prompt, new in zip(same, output[:, length:].tolist(), strict=True)}
    (made,) = one_rank.run(cases.generated, TINY, None, {"": (requests, {**DYNAMIC, "max_batch": 8})})
    tokens, told = made[""]
    for number, (prompt, new) in enumerate(requests):
        assert tokens[number] == expected[tuple(prompt)][:new], number
    assert told_in_turn(told, 200) == tokens


# Sampling


@pytest.mark.parametrize("batching", BOTH)
def test_sampling_is_reproducible(two_ranks, batching):
    many = asked(prompts([3, 9, 5]), 12)
    options = {**BOTH[batching], "temperature": 1.5}
    runs = {"first": (many, {**options, "seed": 7}), "other": (many, {**options, "seed": 8})}
    runs |= {"again": (many, {**options, "seed": 7}), "greedy": (many, BOTH[batching])}
    made = {name: tokens for name, (tokens, _) in only(two_ranks.run(cases.generated, TINY, None, runs)).items()}
    assert made["first"] == made["again"]
    assert made["first"] != made["other"] and made["first"] != made["greedy"]
    assert all(len(new) == 12 and all(0 <= token < VOCAB for token in new) for new in made["first"])


@pytest.mark.parametrize("batching", BOTH)
def test_padding_of_the_vocabulary_is_never_chosen(four_ranks, batching):
    """Five words on four ranks: three of eight are padding, and at this temperature all are as good as equal. Of 160
    tokens that many without one of them would have the probability (5/8)^160."""
    model = ("llama", {"vocab_size": 5})
    requests = asked(prompts([2, 5, 3, 4, 6, 3, 2, 5], vocab=5), 20)
    options = {**BOTH[batching], "temperature": 1000.0}
    runs = {"": (requests, options), "greedy": (requests, BOTH[batching])}
    made = only(four_ranks.run(cases.generated, model, None, runs))
    assert {token for new in made[""][0] for token in new} == set(range(5))
    assert made["greedy"][0] == by_transformers(build("llama", vocab_size=5), [prompt for prompt, _ in requests], 20)


# Sequence parallelism and refusals


def test_sequence_parallel(two_ranks):
    """Odd numbers of tokens do not divide among the ranks, and neither does a batch of three requests."""
    hf, many = build("llama"), prompts([3, 5, 9])
    artifact = make_artifact(hf, "W4A8", (2,))
    lowbit.apply_to_huggingface(hf, artifact, 2)
    runs = {"": (asked(many, 7), DYNAMIC)}
    made = only(two_ranks.run(cases.generated, TINY, artifact, runs, True))
    assert made[""][0] == by_transformers(hf, many, 7)


def test_pipeline_stages(two_ranks):
    """Both stages know the tokens, and are told them."""
    hf, many = build("llama"), prompts([3, 5, 9])
    artifact = make_artifact(hf, "W4A4")
    lowbit.apply_to_huggingface(hf, artifact)
    runs = {name: (asked(many, 7), how) for name, how in BOTH.items()}
    expected = by_transformers(hf, many, 7)
    for name, (tokens, told) in only(two_ranks.run(cases.generated, TINY, artifact, runs, False, 2)).items():
        assert tokens == told_in_turn(told, 3) == expected, name


def test_ranks_stop_at_the_same_step(two_ranks):
    """Pipeline stages too, of which the first would else wait for the last one's tokens."""
    runs = {name: (asked(prompts([3, 3]), 7), how) for name, how in BOTH.items()}
    assert only(two_ranks.run(cases.stopped, TINY, runs)) == dict.fromkeys(BOTH, (4, 6))


def test_requests_that_cannot_be_served(two_ranks):
    """Told before the first token is made, whichever of the requests it is."""
    good = [5, 6, 7]
    long = prompts([60])[0]
    runs = {}
    for batching, how in BOTH.items():
        runs[f"empty {batching}"] = [(good, 4), ([], 4)], how
        runs[f"long {batching}"] = [(good, 4), (long, 5)], how
        runs[f"full {batching}"] = [(long, 4)], how
    for outcome in two_ranks.run(cases.refused, TINY, runs):
        for name, (line, tokens) in outcome.items():
            if "full" in name:
                assert (line, tokens) == ("accepted", 4)
                continue
            assert tokens == 0 and "\n" not in line
            words = ["prompt 1 has no tokens"] if "empty" in name else ["prompt 1 has 60 tokens", "5 more", "64"]
            assert all(word in line for word in words), line
    static = {"static": ([(good, 4)], STATIC)}
    for outcome in two_ranks.run(cases.refused, TINY, static, True):
        assert "sequence_parallel" in outcome["static"][0] and "batching=dynamic" in outcome["static"][0]


@pytest.mark.parametrize("max_batch", [1, 2, 3, 5])
def test_any_number_in_flight(two_ranks, max_batch):
    """Megatron rounds what fits into its cache down to a multiple of four requests."""
    many = prompts([4, 6, 5, 7, 3, 8])
    runs = {name: (asked(many, 5), {**how, "max_batch": max_batch}) for name, how in BOTH.items()}
    expected = by_transformers(build("llama"), many, 5)
    made = only(two_ranks.run(cases.generated, TINY, None, runs))
    assert all(tokens == expected for tokens, _ in made.values())


def test_more_than_a_block_of_the_cache(two_ranks):
    """Pages hold 256 tokens: prompts end before, at and after their ends, and new tokens cross them."""
    changes = {"max_position_embeddings": 640}
    hf, many = build("llama", **changes), prompts([253, 256, 300, 510, 2])
    artifact = make_artifact(hf, "W4A8", (2,))
    lowbit.apply_to_huggingface(hf, artifact, 2)
    made = only(two_ranks.run(cases.generated, ("llama", changes), artifact, {"": (asked(many, 6), DYNAMIC)}))
    assert made[""][0] == by_transformers(hf, many, 6)


def test_no_requests(one_rank):
    runs = {name: ([], how) for name, how in BOTH.items()}
    assert one_rank.run(cases.generated, TINY, None, runs) == [{name: ([], []) for name in BOTH}]


def test_plans_alone(two_ranks):
    """Full-precision weights with low-bit communication."""
    hf, many = build("qwen2"), prompts([4, 7])
    artifact = Artifact(None, make_artifact(hf, tp_sizes=(2,)).plans)
    lowbit.apply_to_huggingface(hf, artifact, 2)
    runs = {name: (asked(many, 8), how) for name, how in BOTH.items()}
    made = only(two_ranks.run(cases.generated, ("qwen2", {}), artifact, runs))
    expected = by_transformers(hf, many, 8)
    assert all(tokens == expected for tokens, _ in made.values())


@pytest.mark.parametrize("sequence_parallel", (False, True))
def test_a_model_can_be_trained_afterwards(two_ranks, sequence_parallel):
    """Megatron keeps the buffer into which sequence parallelism gathers. What is allocated in inference mode has no
    place in autograd, so it must not stay."""
    for losses in two_ranks.run(cases.trained_after, sequence_parallel):
        assert losses["generate"] == losses["evaluate"] == losses["nothing"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_requests_of_a_server_come_and_go(pools, ranks):
    """Some join others in the middle and leave before them: each gets the tokens that it gets alone."""
    hf, many = build("llama"), prompts(LENGTHS)
    artifact = make_artifact(hf, "W4A8", (ranks,) if ranks > 1 else ())
    lowbit.apply_to_huggingface(hf, artifact, ranks)
    arrivals = list(zip([0, 0, 1, 5, 5, 9], many, strict=True))
    assert only(pools[ranks].run(cases.come_and_go, artifact, arrivals, 8)) == by_transformers(hf, many, 8)
