"""Requests in flight on one Hugging Face model: continuous batching, with a KV cache for each request.

    batch = Batch(model)
    batch.advance([(7, [1, 50, 3])], [], sample)   # prompts, each by itself; sample(numbers, logits) chooses tokens
    batch.advance([], [9], sample)                 # one more token of each request, all in one forward pass

A step runs the model once on [requests, 1] tokens. Linears, and the collectives behind them, see all requests;
attention runs request by request, each on its own cache and as transformers' generate would run it, so nothing is
padded and no request's attention depends on what else is in the batch.

transformers 5 has continuous batching of its own (generate_batch). It runs on a CPU, once its cache is told a size (by
default it takes a share of all memory: 49 s for four prompts that take 1 s), but not here: it knows only its own
attention functions, where quantized attention is one of ours (attention.py); its paged cache would not hold K and V
packed; and it takes the tensor-parallel ranks from a device mesh, which a model of DeepSpeed's AutoTP does not have, so
ranks would not agree on what they run.

A model whose attention is code of its own, or keeps another state than K and V, cannot be split like that. A trial with
two short prompts finds this out; then a step runs the requests one after the other.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

logger = logging.getLogger("megatron_lowbit")

_TRIAL = ([1, 2, 3], [4, 5])  # token ids that every vocabulary has
_TOLERANCE = 1e-2  # of a trial's logits, relative to the largest: float rounding in bf16, far below another context's


Sample = Callable[[list[int], Tensor], list[int]]


class Batch:
    """The requests in flight, by their numbers; every rank calls the same methods with the same arguments."""

    def __init__(self, model: Any):
        self.model = model
        self.caches: dict[int, Cache] = {}
        self.last: dict[int, int] = {}  # {request: its newest token, which the model has not seen yet}
        self.device = next(model.parameters()).device
        self._known = inspect.signature(model.forward).parameters.keys()  # a few families know no positions
        self.joined = self._can_join()

    def advance(self, add: Sequence[tuple[int, Sequence[int]]], drop: Sequence[int], sample: Sample) -> None:
        """Give every request one more token, after new ones, (number, prompt ids), came in and others were dropped.

        sample(numbers, logits [requests, vocab]) returns their tokens, the same on all ranks.
        """
        for number in drop:
            self.drop(number)
        logits = [self.step(self.last)] if self.last else []
        logits += [self.add(number, ids) for number, ids in add]
        if logits:
            numbers = [*self.last, *(number for number, _ in add)]
            self.last = dict(zip(numbers, sample(numbers, torch.cat(logits)), strict=True))

    def add(self, number: int, ids: Sequence[int]) -> Tensor:
        """Run a prompt; returns the logits [1, vocab] of what follows it."""
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        logits = self._run(cache, ids, 0)
        self.caches[number] = cache
        return logits

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Run one more token of these requests, {number: token}; returns logits [requests, vocab], in their order."""
        if self.joined and len(tokens) > 1:
            return self._run_joined(tokens)
        return torch.cat([self._run(self.caches[n], [t], self.caches[n].get_seq_length()) for n, t in tokens.items()])

    def drop(self, number: int) -> None:
        """Forget a request and free its cache; one that was never added is no matter."""
        self.caches.pop(number, None)
        self.last.pop(number, None)

    @torch.inference_mode()
    def _run(self, cache: Cache, ids: Sequence[int], past: int) -> Tensor:
        """Run tokens of one request behind the `past` tokens in its cache."""
        inputs = torch.tensor([ids], device=self.device)
        mask = torch.ones(1, past + len(ids), dtype=torch.int64, device=self.device)
        positions = torch.arange(past, past + len(ids), device=self.device).unsqueeze(0)
        extra = {"position_ids": positions, "logits_to_keep": 1}
        known = {name: value for name, value in extra.items() if name in self._known}
        out = self.model(input_ids=inputs, attention_mask=mask, past_key_values=cache, use_cache=True, **known)
        return out.logits[:, -1]

    @torch.inference_mode()
    def _run_joined(self, tokens: Mapping[int, int]) -> Tensor:
        caches = [self.caches[number] for number in tokens]
        inputs = torch.tensor([[token] for token in tokens.values()], device=self.device)
        positions = torch.tensor([[cache.get_seq_length()] for cache in caches], device=self.device)
        joined = Cache(layers=[_JoinedLayer(layers) for layers in zip(*(c.layers for c in caches), strict=True)])
        with _request_by_request(self.model):
            out = self.model(input_ids=inputs, position_ids=positions, past_key_values=joined, use_cache=True)
        return out.logits[:, -1]

    def _can_join(self) -> bool:
        """Try whether joined requests give what they give alone."""
        alone = {number: int(self.add(number, ids).argmax()) for number, ids in enumerate(_TRIAL)}
        want = torch.cat([self._run(self.caches[n], [t], len(_TRIAL[n])) for n, t in alone.items()])
        for number, ids in enumerate(_TRIAL):
            self.add(number, ids)
        try:
            got = self._run_joined(alone)
        except Exception as error:  # whatever a family's own code makes of caches that it does not know
            fits, why = False, f"{type(error).__name__}: {error}"
        else:
            fits = bool((got - want).abs().max() <= _TOLERANCE * want.abs().max())
            why = "its logits differ"
        self.caches.clear()
        if not fits:
            logger.info("requests run one after the other: %s does not run them joined (%s)", type(self.model), why)
        return fits


class _JoinedLayer(CacheLayerMixin):
    """One layer of the caches of several requests: K and V are lists, with [1, heads, tokens, head_dim] of each."""

    def __init__(self, layers: Sequence[Any]):
        super().__init__()
        self.layers, self.is_initialized = layers, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        new = zip(self.layers, key_states.split(1), value_states.split(1), strict=True)
        keys, values = zip(*(layer.update(k, v, *args, **kwargs) for layer, k, v in new), strict=True)
        return list(keys), list(values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # no mask is needed: the one new token of a request sees all of its cache

    def get_seq_length(self) -> int:
        return max(layer.get_seq_length() for layer in self.layers)

    def get_max_length(self) -> int:
        return -1


_lock = threading.Lock()
_steps: Counter[str] = Counter()  # {attention function: joined steps that run now, of any model in any thread}
_plain: dict[str, Callable[..., Any] | None] = {}  # {the same: what it is otherwise}


@contextlib.contextmanager
def _request_by_request(model: nn.Module) -> Iterator[None]:
    """Have the model's attention function run on each request by itself, where K and V are lists.

    transformers has one table of these functions for all models of a process: where K and V are tensors, which is what
    another thread's model has, they run as they are, and the last step to end leaves the table as it was.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    names = {str(n) for config in configs if (n := getattr(config, "_attn_implementation", None)) is not None}
    with _lock:
        for name in names:
            if not _steps[name]:
                _plain[name] = ALL_ATTENTION_FUNCTIONS.get(name)
                ALL_ATTENTION_FUNCTIONS[name] = _each(_plain[name])
            _steps[name] += 1
    try:
        yield
    finally:
        with _lock:
            for name in names:
                _steps[name] -= 1
                if not _steps[name]:
                    _put_back(name, _plain.pop(name))


def _put_back(name: str, function: Callable[..., Any] | None) -> None:
    """Have the table hold this function again; it may have been a process's own, in place of transformers'."""
    del ALL_ATTENTION_FUNCTIONS[name]
    if function is not None and ALL_ATTENTION_FUNCTIONS.get(name) is not function:
        ALL_ATTENTION_FUNCTIONS[name] = function


def _each(attention: Callable[..., Any] | None) -> Callable[..., Any]:
    def run(module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any = None, **options: Any) -> Any:
        # eager is not among the functions: every model brings its own, in its own file
        attend = attention or sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
        if not isinstance(key, list):
            return attend(module, query, key, value, attention_mask, **options)
        rows = zip(query.split(1), key, value, strict=True)
        return torch.cat([attend(module, q, k, v, None, **options)[0] for q, k, v in rows]), None

    return run
