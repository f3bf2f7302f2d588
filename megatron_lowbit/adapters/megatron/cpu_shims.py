"""Megatron-Core on CPUs: what stands in for the GPU that its code takes for granted. Never used where there is a GPU.

enable()        before a model is built: current device and stream, synchronize, a random-state tracker without CUDA
cuda_is_cpu()   while it is built: "cuda" means "cpu"
engines()       around the inference engines: that, and events and paged attention in plain torch
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_lowbit.adapters.megatron.attention import causal_attention

_ALL = (-1, -1)  # of a window: no limit


def enable() -> None:
    """Let Megatron run without a GPU; do nothing where there is a GPU."""
    if torch.cuda.is_available():
        return
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.current_stream = lambda *args, **kwargs: None  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def cuda_is_cpu() -> contextlib.AbstractContextManager[Any]:
    """Put tensors that are made on or moved to "cuda" inside the context on the CPU. Do nothing where there is a
    GPU."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CudaIsCpu()


@contextlib.contextmanager
def engines() -> Iterator[None]:
    """Let Megatron's inference engines run inside; everything is put back afterwards. Do nothing where there is a
    GPU."""
    if torch.cuda.is_available():
        yield
        return
    import megatron.core.inference.communication_utils as communication_utils
    import megatron.core.inference.contexts.dynamic_context as dynamic_context
    import megatron.core.inference.engines.dynamic_engine as dynamic_engine
    import megatron.core.inference.text_generation_controllers.text_generation_controller as controller
    import megatron.core.transformer.attention as attention

    nothing = lambda *args, **kwargs: None  # noqa: E731
    replaced = [
        (torch.cuda, "Event", _Event),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "stream", contextlib.nullcontext),
        (torch.cuda, "memory_stats", lambda *args, **kwargs: {}),
        (torch.cuda.nvtx, "range_push", nothing),
        (torch.cuda.nvtx, "range_pop", nothing),
        (dynamic_engine, "range_push", nothing),
        (dynamic_engine, "range_pop", nothing),
        (controller, "range_push", nothing),
        (controller, "range_pop", nothing),
        (communication_utils, "_is_cuda", nothing),
        (dynamic_context, "triton_append_key_value_cache", None),
        (attention, "is_fa_min_version", lambda version: True),
        (attention, "flash_attn_varlen_func", paged_attention),
        (attention, "flash_attn_with_kvcache", paged_decode),
        (threading.Thread, "run", _thread_run),  # a server's engine runs in one, and a mode holds in one thread alone
    ]
    before = [(owner, name, getattr(owner, name, None)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        with _CudaIsCpu():
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


_own_thread_run = threading.Thread.run


def _thread_run(thread: threading.Thread) -> None:
    with _CudaIsCpu():
        _own_thread_run(thread)


class _CudaIsCpu(TorchFunctionMode):
    """device="cuda" is the CPU, x.cuda() is x, memory is not pinned, and x.type() is named as optimizers insist."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return str(function(*args)).replace("torch.", "torch.cuda.", 1)
        if function is torch.device and args and str(args[0]).startswith("cuda"):
            return torch.device("cpu")  # also "cuda:cpu", with what current_device gives here
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)


class _Stream:
    """A torch.cuda.Stream with nothing in it."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_event(self, event: Any) -> None:
        pass


class _Event:
    """A torch.cuda.Event that reads the clock."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.time = 0.0

    def record(self, *args: Any) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return (other.time - self.time) * 1e3


def _attend(q: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, length: int, scale: float) -> Tensor:
    """Attend with q [tokens, heads, d], the last `tokens` of a sequence of `length` whose K and V lie in `blocks` of
    the cache [blocks, block size, groups, d] -> [tokens, heads, d]; causal."""
    used = blocks[: -(-length // keys.shape[1])].long()
    k, v = (cache[used].flatten(0, 1)[:length].unsqueeze(1) for cache in (keys, values))
    return causal_attention(q.unsqueeze(1), k, v, scale).squeeze(1)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: Tensor,
    window_size: tuple[int, int] = _ALL,
    return_attn_probs: bool = False,
) -> Tensor:
    """Stand in for flash_attn_varlen_func over a paged cache: q [tokens, heads, d] of several requests, one after the
    other."""
    assert window_size == _ALL and not return_attn_probs, "GPTModels here have no sliding windows and no sinks"
    output = torch.zeros_like(q)
    for request in range(len(cu_seqlens_q) - 1):
        first, last = int(cu_seqlens_q[request]), int(cu_seqlens_q[request + 1])
        length = int(cu_seqlens_k[request + 1] - cu_seqlens_k[request])
        if last > first:
            output[first:last] = _attend(q[first:last], k, v, block_table[request], length, softmax_scale)
    return output


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    causal: bool,
    block_table: Tensor,
    num_splits: int = 0,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = _ALL,
) -> Tensor:
    """Stand in for flash_attn_with_kvcache over a paged cache: q [requests, 1, heads, d]."""
    assert window_size == _ALL, "GPTModels here have no sliding windows"
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    output = torch.zeros_like(q)
    for request, length in enumerate(cache_seqlens.tolist()):
        if length:
            blocks = block_table[request]
            output[request] = _attend(q[request], k_cache, v_cache, blocks, length, scale)
    return output
