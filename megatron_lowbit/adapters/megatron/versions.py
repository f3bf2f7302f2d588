"""Where the versions of Megatron-Core differ: which one this is, and how its inference engines are made.

    0.16          the wrapper takes an InferenceWrapperConfig, the dynamic context its numbers one by one
    from 0.17 on  the wrapper takes the model and the context, the dynamic context an InferenceConfig
    from 0.18 on  the dynamic context holds the token that ends each running request, before that the controller;
                  and engines set a flag of the whole process, which a model that is trained must not find
    0.18          the controller has no room for the next tokens until its own sampler has run
    before 0.19   a dynamic context scales what YaRN turns only where it is told to, and nobody tells it

What is there decides, not the version's number, so that a version between two of these works too.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import megatron.core
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

import megatron_lowbit.adapters.megatron.core  # noqa: F401 (says what to install where that is missing)
from megatron_lowbit.runtime.launcher_env import env_rank

try:
    from megatron.core.inference.config import InferenceConfig
except ImportError:  # 0.16
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig

    InferenceConfig = None

try:
    from megatron.core.inference.utils import InferenceMode
except ImportError:  # 0.16, 0.17
    InferenceMode = None

TRIED = ("0.16", "0.17", "0.18", "0.19", "0.20")

logger = logging.getLogger("megatron_lowbit")


def core_version() -> str:
    """Return the version of the Megatron-Core that is imported, which may lie beside an installed one."""
    return str(megatron.core.__version__)


def warn_untried(version: str) -> None:
    """Log a warning, on rank 0, if a version is none of those that this adapter was tried with."""
    if ".".join(version.split(".")[:2]) not in TRIED and env_rank() == 0:
        logger.warning("megatron-core %s has not been tried with megatron_lowbit; %s have", version, ", ".join(TRIED))


warn_untried(core_version())


def define_router_product() -> None:
    """Let a router multiply without Transformer Engine, whose function 0.16 asks for all the same."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def static_wrapper(kind: type, model: Any, max_requests: int, length: int) -> Any:
    """Return a GPTInferenceWrapper, of class `kind`, with the context that the static engine runs in.

    length: tokens of a prompt and its continuation, at most.
    """
    context = StaticInferenceContext(max_requests, length)
    return _wrapper(kind, model, context, max_requests, length)


def dynamic_wrapper(kind: type, model: Any, max_requests: int, length: int, buffer_gb: float) -> Any:
    """Return a GPTInferenceWrapper, of class `kind`, with the context that the dynamic engine runs in: a paged cache of
    buffer_gb."""
    if InferenceConfig is not None:
        options = InferenceConfig(
            max_sequence_length=max(length, max_requests),
            buffer_size_gb=buffer_gb,
            max_tokens=max(length, DynamicInferenceContext.DEFAULT_MAX_TOKENS),  # a whole prompt in one step
            pg_collection=model.pg_collection,
        )
        context = DynamicInferenceContext(model.config, options)
    else:
        config = _wrapper_config(model, max_requests, length)
        context = DynamicInferenceContext.from_config(config, model, max_requests, buffer_gb, num_cuda_graphs=None)
    scale_rotary(context, model.config)
    return _wrapper(kind, model, context, max_requests, length)


def scale_rotary(context: DynamicInferenceContext, config: Any) -> None:
    """Have a dynamic context scale queries and keys that YaRN has turned, as attention without a cache does."""
    if not hasattr(config, "yarn_rotary_scaling_factor"):
        return
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding  # of a name that may change

    factor = yarn_rotary_pos_embedding._yarn_get_concentration_factor_from_config(config)
    for name in ("apply_rotary_emb_query", "apply_rotary_emb_key"):
        setattr(context, name, partial(getattr(context, name), mscale=factor))


def dynamic_engine(controller: Any, seed: int) -> DynamicInferenceEngine:
    context = controller.inference_wrapped_model.inference_context
    if InferenceConfig is not None:
        return DynamicInferenceEngine(controller, context)
    return DynamicInferenceEngine(controller, context, enable_cuda_graph=False, random_seed=seed)


def ends_of_running(controller: Any) -> Tensor:
    """Return the token that ends each running request of a dynamic engine, to be changed in place.

    The controller has just sampled the requests' next tokens, and compares those with these.
    """
    context = controller.inference_wrapped_model.inference_context
    running = context.total_request_count - context.paused_request_count
    if hasattr(context, "active_request_metadata"):
        return context.active_request_metadata["termination_id"][:running]
    return controller._request_metadata["termination_id"][context.paused_request_count : context.total_request_count]


def last_logits(controller: Any, *logits: Tensor) -> Tensor:
    """Return the logits [requests, vocab] that a dynamic engine's next tokens follow from. logits: what it handed over,
    which newer ones keep instead."""
    context = controller.inference_wrapped_model.inference_context
    found = logits[0] if logits else controller._all_logits_cuda
    running = context.total_request_count - context.paused_request_count
    settings = context if hasattr(context, "materialize_only_last_token_logits") else context.config
    rows = found.squeeze(0) if settings.materialize_only_last_token_logits else context.last_token_logits(found)
    return rows[:running]


def put_tokens(controller: Any, tokens: list[int]) -> None:
    """Give a dynamic engine's running requests their next tokens, in order."""
    if controller._sampled_tokens_cuda is None:  # 0.18 takes what its own sampler returns
        context = controller.inference_wrapped_model.inference_context
        device = torch.cuda.current_device()
        controller._sampled_tokens_cuda = torch.empty(context.max_requests, dtype=torch.int64, device=device)
    controller._sampled_tokens_cuda[: len(tokens)] = torch.tensor(tokens).to(controller._sampled_tokens_cuda)


@contextlib.contextmanager
def engine_runs() -> Iterator[None]:
    """Let an inference engine run inside, whether it was made here or before; afterwards the models of this process are
    again what they were."""
    before = InferenceMode is not None and InferenceMode.is_active()
    if InferenceMode is not None:
        InferenceMode.set_active()  # an engine does so itself only when it is made
    try:
        yield
    finally:
        if InferenceMode is not None and not before:
            InferenceMode.unset_active()


def _wrapper(kind: type, model: Any, context: Any, max_requests: int, length: int) -> Any:
    if InferenceConfig is not None:
        return kind(model, context)
    return kind(model, _wrapper_config(model, max_requests, length), context)


def _wrapper_config(model: Any, max_requests: int, length: int) -> Any:
    return InferenceWrapperConfig(
        hidden_size=model.config.hidden_size,
        params_dtype=model.config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=model.vocab_size,
        inference_max_requests=max_requests,
        inference_max_seq_length=length,
    )
