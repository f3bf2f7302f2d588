"""engine=megatron: a GPTModel on its ranks, as the stages see every engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import GenerationConfig

from megatron_lowbit.adapters import patching
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface.skeleton import skeleton
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import CommConfig, CommMode, StageConfig, WeightsConfig
from megatron_lowbit.io.fingerprint import Fingerprint, fingerprint_fields
from megatron_lowbit.launch.engines.base import Engine, GenerateOptions, ids_of
from megatron_lowbit.launch.engines.prepare import take_checkpoints
from megatron_lowbit.launch.inputs import model_name
from megatron_lowbit.launch.loading import compute_dtype, load_model, read_config, read_tokenizer, source_of
from megatron_lowbit.runtime.distributed import (
    all_gather_stack,
    all_gather_values,
    device,
    group_rank,
    on_rank_zero,
    world_size,
)
from megatron_lowbit.runtime.launcher_env import launched
from megatron_lowbit.runtime.rendezvous import join


def start_megatron(config: StageConfig, weights: Sequence[WeightsConfig]) -> Engine:
    """Start engine=megatron: each rank builds its share of the GPTModel and reads its own weights."""
    import megatron_lowbit.adapters.megatron.core  # noqa: F401 (says what to install where that is missing)
    from megatron_lowbit.adapters.megatron import model as megatron_model
    from megatron_lowbit.adapters.megatron.apply import refuse_head

    assert launched(), "run_stage starts ranks for engine=megatron"
    join()
    megatron_model.initialize(config.tp, config.pp, config.seed % 2**31)
    folder = Artifact.load(config.artifact) if config.artifact is not None else Artifact()
    refuse_head(folder)
    source = source_of(config, folder.checkpoint)
    hf_config, tokenizer = read_config(source), read_tokenizer(source)
    text_config = getattr(hf_config, "text_config", None) or hf_config
    huggingface.check_divides(text_config, config.tp, "tp", share_kv_heads=True)
    weights_folder = None if config.model is None else _folder(config.model)
    stored: Any = weights_folder or (folder.checkpoint.tensors if folder.checkpoint is not None else {})
    megatron_model.untie_(text_config, stored)
    rotation = None if folder.checkpoint is None else folder.checkpoint.rotation
    if (rotation is not None and rotation.residual) or any(w.rotation != "none" for w in weights):
        text_config.tie_word_embeddings = False  # a rotated embedding is no longer the output projection
    model = megatron_model.build(text_config, compute_dtype(config), config.sequence_parallel)
    checkpoints = {folder.checkpoint.scheme_name: folder.checkpoint} if folder.checkpoint is not None else {}
    full_precision = config.model is not None
    if config.model is None:
        assert folder.checkpoint is not None, "source_of has asked for a model"
        megatron_model.load_rest(model, folder, text_config)
    elif config.inject_outliers is not None or (weights and not checkpoints):
        whole = load_model(config, hf_config, folder.checkpoint)  # the whole model, on the CPU
        checkpoints = take_checkpoints(folder.checkpoint, whole, weights, hf_config.dtype, config.seed)
        megatron_model.load_weights(model, whole.state_dict(), text_config)
    else:
        assert weights_folder is not None
        megatron_model.load_weights(model, weights_folder, text_config)
    context = model.max_sequence_length
    engine = MegatronEngine(model, tokenizer, hf_config, context, config.tp, checkpoints, folder.plans, full_precision)
    groups = model.pg_collection
    engine.dp_group = groups.dp if world_size(groups.dp) > 1 else None
    engine.pp_group = groups.pp if world_size(groups.pp) > 1 else None
    engine.end_id = end_id(weights_folder or config.artifact, text_config)
    return engine


def end_id(folder: str | Path | None, hf_config: Any) -> int | list[int] | None:
    """Return the token or tokens that end a text, as transformers' generate knows them: those of
    generation_config.json; of the model's config where there is no such file."""
    try:
        return GenerationConfig.from_pretrained(str(folder), local_files_only=True).eos_token_id
    except OSError:
        return GenerationConfig.from_model_config(hf_config).eos_token_id


def _folder(name: str) -> Path:
    from megatron_lowbit.launch.model_folder import download

    return Path(on_rank_zero(lambda: download(model_name(name))))


class Length:
    """Tokens of the windows in the forward pass that is running: sequence parallelism pads them."""

    tokens = 0


@dataclass(frozen=True)
class SiteView:
    """A row-parallel linear of Megatron's as the other engines' are: batch first, whole sequence, one output."""

    module: Any
    length: Length
    bias: None = None  # Megatron adds it later

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    def register_forward_hook(self, hook: Any) -> Any:
        def seen(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            hook(self, (self._batch_first(args[0]),), self._batch_first(self._whole(output)))

        return self.module.register_forward_hook(seen)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the linear: x [windows, length, in / N] -> [windows, length, out], without bias."""
        tokens = x.transpose(0, 1)
        padding = -len(tokens) % world_size(self.module.tp_group)
        tokens = nn.functional.pad(tokens, (0, 0, 0, 0, 0, padding)).contiguous()
        return self._batch_first(self._whole(self.module(tokens)))

    def parameters(self) -> Any:
        return self.module.parameters()

    def to(self, where: Any) -> SiteView:
        self.module.to(where)
        return self

    def _whole(self, output: Any) -> Tensor:
        """Return the sum for all tokens, whatever share of them this rank holds."""
        y, bias = output
        if bias is None and self.module.bias is not None:
            y = y - self.module.bias
        return gathered(y, self.module) if self.module.sequence_parallel else y

    def _batch_first(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(0, 1)[:, : self.length.tokens]


@dataclass(frozen=True)
class InputView:
    """A column-parallel linear of Megatron's, of which the input is looked at."""

    module: Any
    length: Length

    def register_forward_hook(self, hook: Any) -> Any:
        def seen(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            x = gathered(args[0], module) if self.module.sequence_parallel else args[0]
            hook(self, (x.transpose(0, 1)[:, : self.length.tokens],), output[0])

        return self.module.register_forward_hook(seen)


def _receive(room: Tensor, stage: int, stages: dist.ProcessGroup) -> Tensor:
    """Receive what pipeline stage `stage` sends, of the shape of `room`."""
    dist.recv(room, dist.get_global_rank(stages, stage), group=stages)
    return room


def gathered(tokens: Tensor, module: Any) -> Tensor:
    """Gather [length / N, batch, features] of every rank -> [length, batch, features]."""
    return all_gather_stack(tokens.contiguous(), module.tp_group).flatten(0, 1)


@dataclass
class MegatronEngine(Engine):
    """`model` is this rank's GPTModel: a pipeline stage with its tensor-parallel shards."""

    end_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        self.length = Length()
        names = huggingface.find_linears(skeleton(self.hf_config, torch.float32))
        self.names = list(names)

    @property
    def group(self) -> dist.ProcessGroup | None:
        group = self.model.pg_collection.tp
        return group if world_size(group) > 1 else None

    def __call__(self, input_ids: Tensor, logits_to_keep: int = 0) -> Any:
        """Run the model: pipeline stages pass the hidden states on, and the last sends the logits to all of them."""
        ids = input_ids.to(device())
        self.length.tokens = length = ids.shape[1]
        if self.model.config.sequence_parallel:
            ids = nn.functional.pad(ids, (0, -length % world_size(self.group)))
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        future = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        stages, stage, last = self.pp_group, group_rank(self.pp_group), world_size(self.pp_group) - 1
        if stages is not None and stage > 0:
            self.model.set_input_tensor(_receive(self._hidden(ids), stage - 1, stages))
        post_process = self.model.post_process
        self.model.post_process = post_process and not logits_to_keep  # calibration reads none
        try:
            output = self.model(ids, positions, future, runtime_gather_output=True)
        finally:
            self.model.post_process = post_process
        if stages is not None and stage < last:
            dist.send(output.contiguous(), dist.get_global_rank(stages, stage + 1), group=stages)
        if logits_to_keep:
            return SimpleNamespace(logits=None)
        if stages is not None:
            vocab = self.model.vocab_size
            if stage != last:
                output = torch.empty(*ids.shape, vocab, dtype=self.model.config.params_dtype, device=ids.device)
            output = output.contiguous()
            dist.broadcast(output, dist.get_global_rank(stages, last), group=stages)
        return SimpleNamespace(logits=output[:, :length, : self.text_config.vocab_size])

    def _hidden(self, ids: Tensor) -> Tensor:
        """Return room for the hidden states that the stage before sends: [tokens, windows, hidden]."""
        config = self.model.config
        tokens = ids.shape[1] // (world_size(self.group) if config.sequence_parallel else 1)
        return torch.empty(tokens, ids.shape[0], config.hidden_size, dtype=config.params_dtype, device=ids.device)

    def _views(self, kind: str) -> Mapping[str, Any]:
        from megatron_lowbit.adapters.megatron.layout import COLUMN, find_linears, find_prefix, parts

        views: dict[str, Any] = {}
        prefix = find_prefix(self.names)
        for (layer, role), (_, module) in find_linears(self.model).items():
            if (kind == "column") == (role in COLUMN):
                name = parts(prefix, layer, role, self.names)[0]
                views[name] = InputView(module, self.length) if kind == "column" else SiteView(module, self.length)
        return views

    def sites(self) -> Mapping[str, Any]:
        return self._views("row")

    def inputs(self) -> Mapping[str, Any]:
        return self._views("column")

    def site_names(self) -> Mapping[str, str]:
        from megatron_lowbit.adapters.megatron.layout import find_linears, find_prefix, parts

        prefix, linears = find_prefix(self.names), find_linears(self.model)
        return {path: parts(prefix, layer, role, self.names)[0] for (layer, role), (path, _) in linears.items()}

    def site_pairs(self) -> dict[str, tuple[Any, Any]]:
        from megatron_lowbit.adapters.megatron.layout import COLUMN, find_linears, find_prefix, parts

        originals, pairs, prefix = patching.original_modules(self.model), {}, find_prefix(self.names)
        for (layer, role), (path, module) in find_linears(self.model).items():
            if path in originals and role not in COLUMN:
                views = SiteView(module, self.length), SiteView(originals[path], self.length)
                pairs[parts(prefix, layer, role, self.names)[0]] = views
        return pairs

    def all_stages(self, sites: dict[str, float]) -> dict[str, float]:
        if self.pp_group is None:
            return sites
        return {name: value for stage in all_gather_values(sites, self.pp_group) for name, value in stage.items()}

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the whole model, on every rank."""
        from megatron_lowbit.adapters import megatron

        mine = megatron.fingerprint(self.model, self.names)["weights"]
        if self.pp_group is not None:
            mine = {name: value for stage in all_gather_values(mine, self.pp_group) for name, value in stage.items()}
        return {**fingerprint_fields(self.text_config), "weights": mine}

    def apply(self, artifact: Artifact, comm_mode: CommMode | CommConfig | None = None) -> None:
        from megatron_lowbit.adapters.megatron.apply import apply_to_megatron

        apply_to_megatron(self.model, artifact, comm_mode)

    def generate(self, prompts: Sequence[list[int]], options: GenerateOptions) -> list[list[int]]:
        from megatron_lowbit.adapters.megatron.inference import Request, generate

        requests = [Request(prompt, min(options.max_new_tokens, self.context - len(prompt))) for prompt in prompts]
        arguments = (options.temperature, options.batching, options.max_batch, options.seed, options.on_token)
        return generate(self.model, requests, self.end_id, *arguments, options.on_step)

    def batch(self, max_batch: int) -> Any:
        from megatron_lowbit.adapters.megatron.inference import DynamicBatch

        return DynamicBatch(self.model, max_batch)

    @property
    def end_ids(self) -> frozenset[int]:
        return ids_of(self.end_id)

    def logits_processors(self, temperature: float, top_p: float, greedy: bool, prompt_length: int) -> Any:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        if greedy:
            return LogitsProcessorList()
        warpers = [TemperatureLogitsWarper(temperature)] + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])
        return LogitsProcessorList(warpers)
