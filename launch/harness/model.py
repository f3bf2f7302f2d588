"""Our engines as models of lm-eval: it tokenizes, batches and scores, the engine computes the logits.

lm-eval 0.4 has no entry points for models: `python -m megatron_lowbit.launch.lm_eval` is its command with this one
registered, and so is any Python that has imported this module:

    --model megatron_lowbit --model_args artifact=DIR,engine=deepspeed,tp=2

Every rank runs lm-eval on the same requests, so that all tensor-parallel ranks come to the same calls of the model, and
get the same scores from the same logits. Data-parallel copies of the model share the documents out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import configure_pad_token, handle_stop_sequences, normalize_gen_kwargs
from lm_eval.models.utils import postprocess_generated_text as cut_at_stops
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.config import EvaluateConfig, LowBitError, shown
from megatron_lowbit.launch.api import nested
from megatron_lowbit.launch.engines.base import Engine, GenerateOptions
from megatron_lowbit.launch.engines.prepare import apply_prepared, check_head, prepare_artifact
from megatron_lowbit.launch.groups import start_copies
from megatron_lowbit.launch.harness.plain import from_plain, to_plain
from megatron_lowbit.launch.inputs import check_inputs
from megatron_lowbit.launch.layout import check_layout, ranks_of
from megatron_lowbit.launch.rows import check_unused
from megatron_lowbit.launch.tokenizer import check_tokenizer
from megatron_lowbit.runtime import launcher_env
from megatron_lowbit.runtime.distributed import (
    PreemptionCheck,
    all_gather_stack,
    device,
    gather_values,
    group_rank,
    world_size,
)
from megatron_lowbit.runtime.launcher_env import launched
from megatron_lowbit.runtime.metrics import MetricLogger

NAME = "megatron_lowbit"
BATCH_SIZE = 8
GREEDY = ("do_sample", "temperature")  # of the settings of generation, those that engines have
# Keys of evaluate that say what is measured, which lm-eval's own arguments do, and where it is written.
NO_EFFECT = (
    *("ablation", "comm_ablation", "correction", "evaluation"),
    *("experiment", "output_dir", "reassembly", "token_ablation"),
)


class EngineLM(HFLM):
    """An engine that runs, patched or not, as lm-eval's Hugging Face model; log-probabilities are float32.

    Args:
        engine: what computes the logits.
        batch_size: sequences per forward pass.
        preemption: asked at every forward pass whether to stop; None: nobody is.

    Raises:
        LowBitError: a tokenizer that is empty, or has no token that a text can begin with.
    """

    def __init__(self, engine: Engine, batch_size: int = BATCH_SIZE, preemption: PreemptionCheck | None = None):
        TemplateLM.__init__(self)  # HFLM's own loads a model
        check_tokenizer(engine.tokenizer)
        if engine.tokenizer.bos_token_id is None and engine.tokenizer.eos_token_id is None:
            raise LowBitError("lm-eval scores a text from a first token on, but the tokenizer has neither bos nor eos")
        self.engine, self.backend = engine, "causal"
        self._model, self._config, self._device = engine.module, engine.hf_config, device()
        self._rank, self._world_size = group_rank(engine.dp_group), world_size(engine.dp_group)
        self.tokenizer = configure_pad_token(engine.tokenizer, engine.hf_config)
        self._max_length, self.batch_size_per_gpu = engine.context, batch_size
        self.batch_sizes: dict[int, int] = {}
        self.softmax_dtype, self.logits_cache, self.truncation = torch.float32, True, False
        self.add_bos_token = self.custom_prefix_token_id = self.enable_thinking = self.think_end_token = None
        self.chat_template_args: dict[str, Any] = {}
        self.preemption = preemption

    def _model_call(self, inps: Tensor, attn_mask: None = None, labels: None = None) -> Tensor:
        """Run the engine on token ids [windows, length], padded on the right, which causal attention does not see;
        returns logits [windows, length, vocab]."""
        if self.preemption is not None:
            self.preemption.check("evaluate keeps finished tasks, and goes on with the next when it is run again")
        with torch.no_grad():
            return self.engine(inps).logits

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[tuple[float, bool]]:
        """Score (name, context, continuation) in token ids; what is too long is cut from the left, as lm-eval does.

        Raises LowBitError for a continuation that is empty or longer than the context, and for tokens that the model
        does not have.
        """
        vocab = self.engine.text_config.vocab_size
        for name, context, continuation in requests:
            what = f"a continuation of {len(continuation)} tokens ({shown(name[1]) if name else 'of a long text'})"
            if not 0 < len(continuation) <= self.max_length:
                raise LowBitError(f"lm-eval cannot score {what}: it takes 1 to {self.max_length}, the model's context")
            if max([*context, *continuation]) >= vocab:
                raise LowBitError(
                    f"lm-eval cannot score {what}: the tokenizer has tokens beyond the model's vocabulary of {vocab}; "
                    "use the model's own tokenizer"
                )
        return super()._loglikelihood_tokens(requests, **options)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue each request's text, up to max_gen_toks tokens, and cut it at its first stop sequence.

        Raises LowBitError for settings of generation that engines do not have, such as top_p.
        """
        texts = []
        for context, settings in (request.args for request in requests):
            wanted = normalize_gen_kwargs(settings, self.max_gen_toks)
            end = None if self.eot_token_id is None else self.tok_decode(self.eot_token_id, False)
            stops = handle_stop_sequences(wanted.pop("until", None), end)
            most = wanted.pop("max_gen_toks")
            other = [key for key in wanted if key not in GREEDY]
            if other or not 0 < most < self.max_length:
                given = f"{other[0]}={shown(wanted[other[0]])}" if other else f"max_gen_toks={most}"
                raise LowBitError(
                    f"{given} cannot be had: generation is greedy or has a temperature, within the context"
                )
            ids = self.tok_encode(context, left_truncate_len=self.max_length - most)
            temperature = float(wanted.get("temperature") or 0.0) if wanted["do_sample"] else 0.0
            check = (lambda: None) if self.preemption is None else self.preemption.check
            (new,) = self.engine.generate([ids], GenerateOptions(most, temperature, on_step=check))
            texts.append(cut_at_stops(self.tok_decode(new), stops, None))
            self.cache_hook.add_partial("generate_until", (context, settings), texts[-1])
        return texts

    def all_gather(self, tensor: Tensor) -> Tensor:
        return all_gather_stack(tensor.reshape(1), self.engine.dp_group).flatten()

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        if self.engine.dp_group is None:
            return [obj]
        gathered = gather_values(to_plain(obj), self.engine.dp_group)
        return None if gathered is None else [from_plain(value) for value in gathered]

    def barrier(self) -> None:
        if self.engine.dp_group is not None:
            dist.barrier(self.engine.dp_group)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes beside its results."""
        return {"model_dtype": str(next(self.engine.module.parameters()).dtype), "tp_size": self.engine.tp_size}


@register_model(NAME)
class LowBitLM(EngineLM):
    """The model of `--model megatron_lowbit`: a folder on an engine, with its artifact applied.

    Args:
        batch_size, max_batch_size, device: lm-eval's; auto is 8, and the device is the rank's own, whatever is given.
        values: keys of `evaluate`, with dots for those in sections: model, artifact, engine, tp, virtual_tp, dp, dtype,
            comm.mode, weights.scheme, ...

    Raises:
        LowBitError: as `evaluate`; several ranks without a launcher.
    """

    def __init__(self, batch_size: Any = None, max_batch_size: Any = None, device: Any = None, **values: Any):
        config = config_of(values)
        size = BATCH_SIZE if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        launcher_env.adopt()
        check_layout("evaluate", config, None)
        check_inputs("generate", config)  # which reads no text either
        if not launched() and (ranks_of("evaluate", config) > 1 or config.engine != "huggingface"):
            raise LowBitError(
                f"engine={config.engine} runs on ranks that a launcher starts: torchrun --nproc-per-node "
                f"{ranks_of('evaluate', config)} -m megatron_lowbit.launch.lm_eval ..."
            )
        engine = start_copies(config, [config.weights])
        artifact = prepare_artifact(engine, config, MetricLogger(config.output_dir, "evaluate", {}, rank=1))
        apply_prepared(engine, artifact, config.comm)
        super().__init__(engine, size, PreemptionCheck() if engine.dp_group is None else None)


def config_of(values: Mapping[str, Any]) -> EvaluateConfig:
    """Return the config of --model_args. Raises LowBitError for keys that have no effect here, or do not exist."""
    given = nested(values)
    unused = [key for key in NO_EFFECT if key in given]
    if unused:
        raise LowBitError(f"model_args: {unused[0]} has no effect: lm-eval has its own arguments for what is measured")
    config = EvaluateConfig(**given)
    check_unused(config)
    check_head(config)
    return config
