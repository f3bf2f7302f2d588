"""Text generation with a GPTModel: Megatron-Core's StaticInferenceEngine, or DynamicInferenceEngine (continuous
batching).

    tokens = generate(model, [Request(ids, 32), ...], on_token=lambda number, token: ...)

Prompts and results are token ids: Megatron's own tokenizing strips a leading BOS. All ranks call it with the same
requests and gets the same tokens.

A server's requests come and go: DynamicBatch keeps one DynamicInferenceEngine for them, and leaves the choice of tokens
to its caller.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines import static_engine
from megatron.core.inference.engines.static_engine import StaticInferenceEngine
from megatron.core.inference.inference_request import InferenceRequest
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from torch import Tensor

from megatron_lowbit.adapters import megatron
from megatron_lowbit.adapters.megatron import cpu_shims, versions
from megatron_lowbit.adapters.megatron.layout import layout_of
from megatron_lowbit.config import LowBitError

Batching = Literal["static", "dynamic"]
OnToken = Callable[[int, int], None]
_BLOCK = 256  # tokens of a block of the paged cache
_ROUNDING = DynamicInferenceContext.REQUEST_ROUNDER
_NO_TOKEN = -1  # Megatron's controllers compare with one id, or with this; ours compare with all that end a text
_PATIENCE = 1000  # steps without a new token, of which chunked prefill of a long prompt takes some


@dataclass
class Request:
    """One prompt: its ids, and at most so many new tokens."""

    prompt: list[int]
    max_new_tokens: int


def generate(
    model: Any,
    requests: Sequence[Request],
    end_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    batching: Batching = "dynamic",
    max_batch: int = 8,
    seed: int = 0,
    on_token: OnToken = lambda number, token: None,
    on_step: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Generate and return the new tokens of every request; greedy at temperature 0.

    end_id: the token that ends a request, and is its last one then; or several, of which each does. None:
    nothing ends it before max_new_tokens. max_batch: requests in flight at once.
    on_token(number of the request, token id) is called as tokens are made, on_step() before each forward step, by all
    ranks equally often; it may raise to stop them. Raises LowBitError for an empty prompt, one
    without room in the model's context, for sequence parallelism with static batching, and for KV heads that
    ranks share with dynamic batching.
    """
    (model,) = megatron.model_chunks(model)
    context = model.max_sequence_length
    for number, request in enumerate(requests):
        if not request.prompt:
            raise LowBitError(f"prompt {number} has no tokens; give some text")
        if len(request.prompt) + request.max_new_tokens > context:
            raise LowBitError(
                f"prompt {number} has {len(request.prompt)} tokens and asks for {request.max_new_tokens} more; "
                f"the model's context is {context}"
            )
    if batching == "static" and model.config.sequence_parallel:
        raise LowBitError("static batching does not support sequence_parallel=true; use batching=dynamic")
    if batching == "dynamic" and (refused := _shared_heads(model)):
        raise LowBitError(f"{refused}; use batching=static")
    if not requests:
        return []
    run = _static if batching == "static" else _dynamic
    ends = [] if end_id is None else [end_id] if isinstance(end_id, int) else list(end_id)
    try:
        with _engine_runs():
            return run(model, requests, ends, temperature, max_batch, seed, on_token, on_step)
    finally:
        _free_buffers()


def _shared_heads(model: Any) -> str | None:
    """Return why dynamic batching does not run on these ranks: each rank's cache holds whole KV heads of its own."""
    groups, ranks = layout_of(model).num_groups, layout_of(model).tp_size
    return f"dynamic batching does not support {groups} KV heads on tp={ranks}" if groups % ranks else None


@contextlib.contextmanager
def _engine_runs() -> Iterator[None]:
    with cpu_shims.engines(), versions.engine_runs(), torch.inference_mode(), _quiet():
        yield


class _NoTokenizer:
    """Megatron asks for an end and for text; ids are all that is wanted here, and our controllers know the ends."""

    def __init__(self, vocab_size: int):
        self.eod = self.eos_id = self.bos = _NO_TOKEN
        self.pad, self.vocab_size = 0, vocab_size

    def tokenize(self, text: str) -> list[int]:
        raise TypeError("prompts are given as ids")

    def detokenize(self, ids: Any, **_: Any) -> str:
        return ""

    def offsets(self, ids: Any, text: str) -> list[int]:
        return [0] * len(ids)


class _SteppingWrapper(GPTInferenceWrapper):
    """The one place that both engines pass on every rank, pipeline stages included, once per decoding step."""

    on_step: Callable[[], None]

    def run_one_forward_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.on_step()
        return super().run_one_forward_step(*args, **kwargs)


def _sampling(temperature: float, new_tokens: int) -> SamplingParams:
    options: dict[str, Any] = {"top_k": 1} if temperature == 0 else {"temperature": temperature, "top_k": 0}
    return SamplingParams(**options, num_tokens_to_generate=new_tokens, termination_id=_NO_TOKEN)


class _DynamicController(TextGenerationController):
    """Ends a request by any of several tokens."""

    ends: Tensor

    def _dynamic_step_context_bookkeeping(self) -> Any:
        end_of_each = versions.ends_of_running(self)
        sampled = self._sampled_tokens_cuda[: len(end_of_each)].to(end_of_each)
        ended = torch.isin(sampled, self.ends.to(sampled))
        end_of_each[ended] = sampled[ended]  # the token that Megatron compares this one with
        return super()._dynamic_step_context_bookkeeping()


class _ServingController(TextGenerationController):
    """Lets `sample` choose the tokens, and ends the requests that are over."""

    sample: Callable[[list[int], Tensor], list[int]]
    over: set[int]

    def _numbers(self) -> list[int]:
        context = self.inference_wrapped_model.inference_context
        return context.request_ids[context.paused_request_count : context.total_request_count].tolist()

    def _dynamic_step_sample_logits(self, *logits: Tensor) -> None:
        numbers = self._numbers()
        rows = versions.last_logits(self, *logits)
        wanted = [place for place, number in enumerate(numbers) if number not in self.over]
        tokens = [0] * len(numbers)
        if wanted:
            chosen = self.sample([numbers[place] for place in wanted], rows[wanted])
            for place, token in zip(wanted, chosen, strict=True):
                tokens[place] = token
        versions.put_tokens(self, tokens)

    def _dynamic_step_context_bookkeeping(self) -> Any:
        end_of_each = versions.ends_of_running(self)
        for place, number in enumerate(self._numbers()):
            if number in self.over:
                end_of_each[place] = 0  # the token that it has been given, which Megatron compares this one with
        return super()._dynamic_step_context_bookkeeping()


class DynamicBatch:
    """A server's requests in flight, by their numbers, on one DynamicInferenceEngine; every rank calls the same methods
    with the same arguments.

    max_batch: requests at once. Raises LowBitError for KV heads that ranks share, and for pipeline stages.
    """

    def __init__(self, model: Any, max_batch: int, seed: int = 0):
        (model,) = megatron.model_chunks(model)
        if refused := _shared_heads(model):
            raise LowBitError(refused)
        if model.config.pipeline_model_parallel_size > 1:
            raise LowBitError("requests that come and go are not supported on pipeline stages; set pp=1")
        self.length = model.max_sequence_length
        with _engine_runs():
            cache_gb = _buffer_gb(model, self.length, max_batch)
            wrapper: Any = versions.dynamic_wrapper(GPTInferenceWrapper, model, max_batch, self.length, cache_gb)
            self.controller = _ServingController(wrapper, _NoTokenizer(model.vocab_size))
            self.engine = versions.dynamic_engine(self.controller, seed)
        self.controller.over = set()

    def advance(
        self,
        add: Sequence[tuple[int, Sequence[int]]],
        drop: Sequence[int],
        sample: Callable[[list[int], Tensor], list[int]],
    ) -> None:
        """Give every request one more token, after new ones, (number, prompt ids), came in and others were dropped.

        sample(numbers, logits [requests, vocab]) returns their tokens, the same on all ranks. What is dropped leaves
        Megatron's engine with its next step.
        """
        self.controller.sample = sample
        with _engine_runs():
            for number, ids in add:
                self.engine.add_request(number, list(ids), _sampling(0.0, self.length - len(ids)))
            self.controller.over = (self.controller.over | set(drop)) & set(self.engine.requests)
            if self.engine.has_unfinished_requests():
                self.engine.step_modern()


def _dynamic(
    model: Any,
    requests: Sequence[Request],
    ends: list[int],
    temperature: float,
    max_batch: int,
    seed: int,
    on_token: OnToken,
    on_step: Callable[[], None],
) -> list[list[int]]:
    length = max(len(request.prompt) + request.max_new_tokens for request in requests)
    cache_gb = _buffer_gb(model, length, max_batch)
    wrapper: Any = versions.dynamic_wrapper(_SteppingWrapper, model, max_batch, length, cache_gb)
    wrapper.on_step = on_step
    controller = _DynamicController(wrapper, _NoTokenizer(model.vocab_size))
    controller.ends = torch.tensor(ends, device=torch.cuda.current_device(), dtype=torch.int64)
    controller.sampling_rng.manual_seed(seed)
    engine = versions.dynamic_engine(controller, seed)
    generated: list[list[int]] = [[] for _ in requests]
    waiting, idle = list(enumerate(requests)), 0
    while waiting or engine.has_unfinished_requests():
        while waiting and len(engine.requests) < max_batch:
            number, request = waiting.pop(0)
            engine.add_request(number, request.prompt, _sampling(temperature, request.max_new_tokens))
        running = {number: entry.record for number, entry in engine.requests.items()}
        before = sum(map(len, generated))
        engine.step_modern()
        for number in sorted(running):
            tokens = [token for part in running[number].requests for token in part.generated_tokens]
            for token in tokens[len(generated[number]) :]:
                generated[number].append(int(token))
                on_token(number, int(token))
        idle = 0 if sum(map(len, generated)) > before else idle + 1
        if idle > _PATIENCE:
            raise LowBitError(f"Megatron's engine makes no progress with {len(running)} requests; lower max_batch")
    return generated


def _buffer_gb(model: Any, length: int, max_batch: int) -> float:
    """Return the memory in GB of the paged cache for max_batch requests of `length` tokens, in whole blocks, and two
    spare ones.

    Megatron rounds the requests it can hold down to a multiple of four and of the ranks: to none, if these are fewer.
    """
    config = model.config
    multiple = math.lcm(_ROUNDING, config.tensor_model_parallel_size)
    blocks = -(-max_batch // multiple) * multiple * -(-length // _BLOCK) + 2
    groups = max(config.num_query_groups // config.tensor_model_parallel_size, 1)
    layers = config.num_layers // config.pipeline_model_parallel_size
    values = 2 * layers * blocks * _BLOCK * groups * config.kv_channels
    return 1.05 * values * config.params_dtype.itemsize / 1024**3


class _StreamingController(TextGenerationController):
    """Tells every sampled token (Megatron's own streaming runs the model in a second thread), and ends a request by any
    of several tokens."""

    on_tokens: Callable[[list[int], list[bool]], None]
    ends: Tensor

    def sample_from_logits(self, *args: Any, **kwargs: Any) -> Tensor:
        tokens = super().sample_from_logits(*args, **kwargs)
        self.on_tokens(tokens.tolist(), kwargs["generation_started"].tolist())
        return tokens

    def update_generation_status(
        self,
        updated_prompts_tokens: Tensor,
        generation_started: Tensor,
        current_context_end_position: int,
        is_generation_done_tensor: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        ended = torch.isin(updated_prompts_tokens[:, current_context_end_position], self.ends) & generation_started
        done = is_generation_done_tensor | ended
        return super().update_generation_status(
            updated_prompts_tokens, generation_started, current_context_end_position, done, *args, **kwargs
        )


def _static(
    model: Any,
    requests: Sequence[Request],
    ends: list[int],
    temperature: float,
    max_batch: int,
    seed: int,
    on_token: OnToken,
    on_step: Callable[[], None],
) -> list[list[int]]:
    """Generate with the static engine, in batches of requests that ask for the same number of tokens (the engine takes
    it from the first of a batch)."""
    generated: list[list[int]] = [[] for _ in requests]
    last = [[end] for end in ends]
    pending = list(range(len(requests)))
    while pending:
        size = requests[pending[0]].max_new_tokens
        batch = [number for number in pending if requests[number].max_new_tokens == size][:max_batch]
        pending = [number for number in pending if number not in batch]

        def on_tokens(tokens: list[int], started: list[bool], batch: list[int] = batch, size: int = size) -> None:
            for number, token, begun in zip(batch, tokens, started, strict=True):
                if begun and len(generated[number]) < size and generated[number][-1:] not in last:
                    generated[number].append(token)
                    on_token(number, token)

        length = max(len(requests[number].prompt) for number in batch) + size
        wrapper: Any = versions.static_wrapper(_SteppingWrapper, model, len(batch), length)
        wrapper.on_step = on_step
        controller = _StreamingController(wrapper, _NoTokenizer(model.vocab_size))
        controller.on_tokens = on_tokens
        controller.ends = torch.tensor(ends, device=torch.cuda.current_device(), dtype=torch.int64)
        controller.sampling_rng.manual_seed(seed)
        engine = StaticInferenceEngine(controller, len(batch), random_seed=seed, legacy=True)
        sampling = _sampling(temperature, size)
        queue = [
            InferenceRequest(
                request_id=number, prompt="", sampling_params=sampling, prompt_tokens=list(requests[number].prompt)
            )
            for number in batch
        ]
        engine.generate(inference_requests=queue)
    return generated


def _free_buffers() -> None:
    """Drop what Megatron has allocated in inference mode and would use again: autograd refuses such tensors, so a model
    could not be trained (under sequence parallelism) after it has generated."""
    buffers = parallel_state.get_global_memory_buffer().buffer
    for key in [key for key, buffer in buffers.items() if buffer is not None and buffer.is_inference()]:
        del buffers[key]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the engines, which announce their own deprecation and draw a progress bar per rank."""
    bar = static_engine.tqdm
    static_engine.tqdm = partial(bar, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        static_engine.tqdm = bar
