"""Zero-edit artifacts: a GPTModel that is built from a ready spec fills itself, in any script.

    MEGATRON_LOWBIT_ARTIFACT=DIR pretrain_gpt.py --spec megatron_lowbit.adapters.megatron llama_lowbit_spec ...
    my_spec = artifact_spec("DIR")          a ready constant: --spec my_module my_spec

What the model holds when its constructor returns, or when the script's --load has come in:

    --load                     an artifact with weights        with plans only          no artifact
    none                       the artifact                    refused                  random weights, rounded
    full precision             the artifact, when loaded       plans, when loaded       rounded when loaded
    low-bit                    the checkpoint, which has weights and plans of its own

Whether a checkpoint is low-bit is read from its metadata.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import distributed as dist

from megatron_lowbit.adapters import patching
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.megatron import scripts
from megatron_lowbit.adapters.megatron.apply import apply_to_megatron, refuse_head
from megatron_lowbit.adapters.megatron.layout import find_linears
from megatron_lowbit.adapters.megatron_names import PARTS, SHARED_ELSEWHERE
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import LowBitError, one_line

ENVIRONMENT = "MEGATRON_LOWBIT_ARTIFACT"
# Names of row-parallel linears.
_ROWS = (*(PARTS[role][1] for role in ("linear_proj", "linear_fc2", "shared_fc2")), f"{SHARED_ELSEWHERE}down_proj")
logger = logging.getLogger("megatron_lowbit")


@dataclass
class Filler:
    """Puts an artifact, or the shapes of a low-bit checkpoint, into a GPTModel; one for all models of a spec.

    folder: the artifact's; None: the environment's.
    """

    folder: Path | None = None
    _read: dict[Path, Artifact] = field(default_factory=dict, repr=False)
    _checked: Any = field(default=None, repr=False)

    def __deepcopy__(self, memo: Any) -> Filler:
        return self  # copies of a spec share what has been read

    def artifact(self) -> Artifact | None:
        """Return the artifact; None where none is named."""
        name = os.environ.get(ENVIRONMENT) if self.folder is None else self.folder
        if not name:
            return None
        folder = Path(name)
        if folder not in self._read:
            self._read[folder] = Artifact.load(folder)
        return self._read[folder]

    def check(self, config: Any) -> None:
        """Raise LowBitError where the artifact is not of a model of this TransformerConfig."""
        artifact = self.artifact()
        if artifact is not None and self._checked is not config:  # the layers of a model share it
            check_config(artifact, config)
            self._checked = config

    def fill(self, model: Any) -> None:
        """Fill the model, or arrange that it is filled when its checkpoint has been loaded."""
        from megatron_lowbit.adapters.megatron.checkpoint import shape_like, stored_kind

        artifact, args = self.artifact(), scripts.script_arguments()
        stored = None if args is None else scripts.loaded_folder(args)
        whole = stored is not None and dist_checkpointing.check_is_distributed_checkpoint(str(stored))
        kind = stored_kind(stored) if stored is not None and whole else "full precision"
        if stored is not None and kind != "full precision":
            if kind == "packed weights":
                _refuse_training(args, f"the checkpoint {str(stored)!r}")
            shape_like(model, stored)
            unused = "" if artifact is None else f"; {_name(artifact)} is not used"
            _say(f"{kind} come from the checkpoint {str(stored)!r}{unused}")
            return
        if artifact is None:
            return
        if artifact.checkpoint is not None and artifact.checkpoint.scheme.weight_bits < 16:
            _refuse_training(args, f"the artifact {str(artifact.folder)!r}")
        if stored is not None:
            _leave_unrounded(model)
            model._lowbit_when_loaded = model.register_load_state_dict_post_hook(partial(_apply, artifact))
        else:
            load_alone(model, artifact)
            _say(_description(artifact, model))


def check_config(artifact: Artifact, config: Any) -> None:
    """Raise LowBitError, naming the script's option, where a TransformerConfig differs from the artifact's model."""
    refuse_head(artifact)
    shapes = _shapes(artifact)
    options = {
        "num_hidden_layers": ("--num-layers", config.num_layers),
        "hidden_size": ("--hidden-size", config.hidden_size),
        "intermediate_size": ("--ffn-hidden-size", config.ffn_hidden_size),
        "num_attention_heads": ("--num-attention-heads", config.num_attention_heads),
        "num_key_value_heads": ("--num-query-groups", config.num_query_groups or config.num_attention_heads),
        "head_dim": ("--kv-channels", config.kv_channels),
    }
    for key, (option, here) in options.items():
        if here != shapes.get(key, here):
            raise LowBitError(
                f"{option} {here} differs from the artifact's {shapes[key]} ({_name(artifact)}); "
                "build the model that was quantized"
            )
    huggingface.check_divides(_heads(config), config.tensor_model_parallel_size, "tp", share_kv_heads=True)
    if artifact.checkpoint is None:
        return
    for name in artifact.checkpoint.linears:
        if name.endswith(_ROWS):
            patching.shard_groups(artifact.checkpoint, name, config.tensor_model_parallel_size)
    if artifact.folder is None or not (artifact.folder / "config.json").exists():
        return
    from megatron_lowbit.adapters.megatron.model_config import transformer_config

    quantized = transformer_config(hf_config_of(artifact), config.params_dtype)
    for key, option in (
        ("normalization", "--normalization"),
        ("layernorm_epsilon", "--norm-epsilon"),
        ("gated_linear_unit", "--swiglu"),
        ("qk_layernorm", "--qk-layernorm"),
        ("num_moe_experts", "--num-experts"),
        ("moe_ffn_hidden_size", "--moe-ffn-hidden-size"),
        ("moe_shared_expert_intermediate_size", "--moe-shared-expert-intermediate-size"),
        ("moe_shared_expert_gate", "--moe-shared-expert-gate"),
        ("moe_router_topk", "--moe-router-topk"),
        ("moe_router_pre_softmax", "--moe-router-pre-softmax"),
    ):
        if getattr(config, key) != getattr(quantized, key):
            raise LowBitError(
                f"{option} is {getattr(config, key)} here and {getattr(quantized, key)} in the artifact's model "
                f"({_name(artifact)}); give the options of the model that was quantized"
            )


def _heads(config: Any) -> Any:
    """Return a TransformerConfig's sizes under Hugging Face's names."""
    return SimpleNamespace(
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups or config.num_attention_heads,
        intermediate_size=config.ffn_hidden_size,
    )


def _shapes(artifact: Artifact) -> dict[str, Any]:
    parts = [artifact.checkpoint, *artifact.plans.values()]
    return next(dict(part.fingerprint) for part in parts if part is not None)


def _name(artifact: Artifact) -> str:
    return f"{ENVIRONMENT}={artifact.folder}" if artifact.folder is not None else "the artifact"


def hf_config_of(artifact: Artifact) -> Any:
    """Return the Hugging Face text config that lies in an artifact's folder, untied where its weights are."""
    from transformers import AutoConfig

    from megatron_lowbit.adapters.megatron.model import untie_

    checkpoint = artifact.checkpoint
    assert checkpoint is not None and artifact.folder is not None
    try:
        whole = AutoConfig.from_pretrained(artifact.folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise LowBitError(f"{str(artifact.folder)!r} has no readable config.json: {one_line(error)}") from None
    config = getattr(whole, "text_config", None) or whole
    untie_(config, checkpoint.tensors)
    if checkpoint.rotation is not None and checkpoint.rotation.residual:
        config.tie_word_embeddings = False
    return config


def load_alone(model: Any, artifact: Artifact) -> None:
    """Fill a GPTModel that no checkpoint will be loaded into from the artifact alone.

    Raises LowBitError for an artifact without weights, and for another embedding, output layer or rotary embedding.
    """
    from megatron_lowbit.adapters.megatron.model import load_checkpoint

    if artifact.checkpoint is None:
        raise LowBitError(f"{_name(artifact)} holds plans only: --load the weights that they were calibrated with")
    hf_config = hf_config_of(artifact)
    shared = model.share_embeddings_and_output_weights
    if shared and not hf_config.tie_word_embeddings:
        raise LowBitError(
            f"the artifact's output projection is not its embedding ({_name(artifact)}); "
            "give --untie-embeddings-and-output-weights"
        )
    _check_rotary(model, hf_config, artifact)
    load_checkpoint(model, artifact, hf_config)


def _check_rotary(model: Any, hf_config: Any, artifact: Artifact) -> None:
    """Raise LowBitError where a GPTModel turns its queries and keys otherwise than the artifact's model does."""
    from megatron_lowbit.adapters.megatron.model_config import rotary

    wanted, here = rotary(hf_config), getattr(model, "rotary_pos_emb", None)
    told = ", ".join(f"{key}={value}" for key, value in wanted.items())
    same_kind = wanted.pop("position_embedding_type") == model.position_embedding_type
    given = wanted | {
        "rotary_percent": model.rotary_percent,
        "rotary_base": model.rotary_base,
        "rope_scaling": model.rotary_scaling,
    }
    differing = [key for key, value in given.items() if value != wanted.get(key, False)]
    inv_freq = RotaryEmbedding(model.config.kv_channels, **wanted, use_cpu_initialization=True).inv_freq
    if here is None or not same_kind or differing or not torch.allclose(here.inv_freq.cpu().float(), inv_freq):
        raise LowBitError(
            f"the model's rotary embedding is not the artifact's ({told}; {_name(artifact)}): give "
            "--position-embedding-type rope, --rotary-base, --rotary-percent and --use-rope-scaling accordingly"
        )


def _leave_unrounded(model: Any) -> None:
    """Keep full-precision weights that are loaded as they are: the artifact replaces them."""
    for _, module in find_linears(model).values():
        module.recipe = None


def _apply(artifact: Artifact, model: Any, incompatible: Any) -> None:
    """Put the artifact into a model whose full-precision weights have just been loaded."""
    model._lowbit_when_loaded.remove()
    del model._lowbit_when_loaded
    apply_to_megatron(model, artifact)
    _say(_description(artifact, model))


def _description(artifact: Artifact, model: Any) -> str:
    size = parallel_state.get_tensor_model_parallel_world_size()
    kinds = [] if artifact.checkpoint is None else [f"{artifact.checkpoint.scheme_name} weights"]
    kinds += [f"the communication plan for {size} ranks"] if size in artifact.plans else []
    return f"{' and '.join(kinds)} of {len(find_linears(model))} linears per rank come from {_name(artifact)}"


def _refuse_training(args: Any, what: str) -> None:
    if args is not None and scripts.trains(args):
        raise LowBitError(
            f"{what} holds packed weights, which cannot be trained; without {ENVIRONMENT} and with a full-precision "
            "checkpoint the spec trains through the rounding, and with --skip-train it evaluates"
        )


def _say(line: str) -> None:
    """Log on rank 0, as a warning, because Megatron's scripts show nothing below it."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning("%s", line)
