"""A loaded model on its engine: one object that the stages calibrate, patch and run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import distributed as dist
from torch import nn

from megatron_lowbit.adapters import patching
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.plan import CommPlan
from megatron_lowbit.config import (
    CommConfig,
    CommMode,
)
from megatron_lowbit.io.fingerprint import Fingerprint
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.runtime.distributed import (
    device,
)


@dataclass
class Engine:
    """A Hugging Face model in one process, and what the other engines share. `model` is what the adapter patches."""

    model: Any
    tokenizer: Any
    hf_config: Any
    context: int
    tp_size: int  # ranks that share the model, real or virtual
    checkpoints: dict[str, LowBitCheckpoint]  # {scheme: ...}: the artifact's, or what the stage asked to quantize
    plans: dict[int, CommPlan]  # the artifact's
    full_precision: bool  # whether the model itself has full-precision weights

    @property
    def module(self) -> nn.Module:
        return self.model

    @property
    def text_config(self) -> Any:
        return getattr(self.hf_config, "text_config", None) or self.hf_config

    @property
    def checkpoint(self) -> LowBitCheckpoint | None:
        return next(iter(self.checkpoints.values()), None)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Return the tensor-parallel group; None for a single rank."""
        return None

    dp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: int = 0) -> Any:
        """Run the model; returns an object with logits [windows, length, vocab], on every rank; logits_to_keep=1: where
        nobody reads them."""
        keep = {"logits_to_keep": logits_to_keep} if logits_to_keep else {}  # a few families do not know it
        return self.module(input_ids=input_ids.to(device()), use_cache=False, **keep)

    def sites(self) -> Mapping[str, Any]:
        """Return {fqn: row-parallel linear} of the unpatched model, as calibrate wants them."""
        return huggingface.row_parallel_sites(self.model)

    def inputs(self) -> Mapping[str, Any]:
        """Return {fqn: column-parallel linear}, the first of each group that reads the same tensor."""
        return huggingface.first_readers(huggingface.find_linears(self.model))

    def site_pairs(self) -> dict[str, tuple[Any, Any]]:
        """Return {fqn: (low-bit row-parallel linear that is in place, what it replaced)}."""
        return patching.site_pairs(self.model)

    def all_stages(self, sites: dict[str, float]) -> dict[str, float]:
        """Return what all pipeline stages have measured of their own sites."""
        return sites

    def site_names(self) -> Mapping[str, str]:
        """Return {a low-bit linear's name in the model: its Hugging Face name}, where they differ."""
        return {}

    def fingerprint(self) -> Fingerprint:
        return huggingface.fingerprint(self.module)

    def apply(self, artifact: Artifact, comm_mode: CommMode | CommConfig | None = None) -> None:
        huggingface.apply_to_huggingface(self.model, artifact, self.tp_size, comm_mode)

    def remove(self) -> None:
        patching.remove(self.model)

    def generate(self, prompts: Sequence[list[int]], options: GenerateOptions) -> list[list[int]]:
        """Generate and return the new tokens of every prompt, one after the other; the same on all ranks."""
        generated = []
        for number, prompt in enumerate(prompts):
            stream = partial(options.on_token, number)
            sampling = (
                {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
            )
            ids = torch.tensor([prompt], device=device())
            output: Any = self.module.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(options.max_new_tokens, self.context - len(prompt)),
                pad_token_id=self.tokenizer.eos_token_id,
                streamer=_TokenStreamer(stream, options.on_step),
                **sampling,
            )
            generated.append(output[0, len(prompt) :].tolist())
        return generated

    def batch(self, max_batch: int) -> Any:
        """Return what runs requests in flight: an object with advance(add, drop, sample), as batching.py's."""
        from megatron_lowbit.adapters.huggingface.batching import Batch

        return Batch(self.module)

    @property
    def end_ids(self) -> frozenset[int]:
        """Return the tokens that end a text."""
        config: Any = self.module.generation_config
        return ids_of(config.eos_token_id)

    def logits_processors(self, temperature: float, top_p: float, greedy: bool, prompt_length: int) -> Any:
        """Return what changes logits before a token is chosen, as transformers' generate would for such a prompt: the
        settings of the model's generation_config.json, but for temperature and top_p."""
        module: Any = self.module
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": module.generation_config.top_k}
        asked = {"do_sample": False} if greedy else {**drawn, "top_k": drawn["top_k"] or 0}
        config, _ = module._prepare_generation_config(None, **asked)
        module._prepare_special_tokens(config, True, device=torch.device("cpu"))
        return module._get_logits_processor(config, input_ids_seq_length=prompt_length, device="cpu")


def ids_of(token: int | Sequence[int] | None) -> frozenset[int]:
    """Return the ids of a config's field that holds one, several or none."""
    return frozenset([] if token is None else [token] if isinstance(token, int) else token)


class _TokenStreamer:
    """The streamer that transformers' generate calls with the prompt, then with every token."""

    def __init__(self, on_token: Callable[[int], None], on_step: Callable[[], None]):
        self.on_token, self.on_step, self.begun = on_token, on_step, False

    def put(self, ids: torch.Tensor) -> None:
        self.on_step()
        if self.begun:
            self.on_token(int(ids))
        self.begun = True

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class GenerateOptions:
    """Settings of generation. on_token(number of the prompt, token id) is called as tokens come; on_step() at every
    decoding step, by all ranks equally often (not all pipeline stages see the tokens)."""

    max_new_tokens: int
    temperature: float = 0.0
    batching: Literal["static", "dynamic"] = "dynamic"
    max_batch: int = 8
    seed: int = 0
    on_token: Callable[[int, int], None] = lambda number, token: None
    on_step: Callable[[], None] = lambda: None
