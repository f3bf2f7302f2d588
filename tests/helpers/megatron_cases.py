"""GPTModels for tests, and what workers of a RankPool run for test_megatron.py: `case(rank, size, *args)`.

Megatron is imported inside the cases, so that pools for other tests never wait for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import torch
from megatron_groups import parallel
from torch import Tensor, nn

import megatron_lowbit as lowbit
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import CommMode, LowBitError
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

LENGTH = 8  # tokens of a window: sequence parallelism shares them among up to 4 ranks


def gpt_model(hf: Any, sequence_parallel: bool = False, spec: Any = None) -> Any:
    """This rank's GPTModel with the weights of a Hugging Face model; spec: one layer's, or a block's."""
    from megatron_lowbit.adapters.megatron import model as megatron_model

    model = megatron_model.build(hf.config, hf.dtype, sequence_parallel, spec)
    return megatron_model.load_weights(model, hf.state_dict(), hf.config)


def token_ids(vocab: int = tiny_models.VOCAB) -> Tensor:
    return tiny_models.token_ids(8, LENGTH, vocab=vocab)


def inputs(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, positions, mask of the future) as GPTModel.forward takes them."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return ids, positions, torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)


@torch.no_grad()
def logits(model: Any, vocab: int = tiny_models.VOCAB) -> Tensor:
    """[windows, tokens, vocab] on every rank, as tiny_models.logits of token_ids()."""
    return model(*inputs(token_ids(vocab)), runtime_gather_output=True)[..., :vocab].clone()


def module_ids(model: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules()}


def kinds(model: nn.Module) -> dict[str, int]:
    """How many of our layers are in place, by class."""
    names = [type(module).__name__ for module in model.modules()]
    return {name: names.count(name) for name in sorted(set(names)) if name.startswith("LowBit")}


def applied(
    rank: int,
    size: int,
    architecture: str,
    sequence_parallel: bool,
    artifacts: dict[str, tuple[Artifact | Path, CommMode | None]],
    changes: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Logits of a GPTModel: as it is, with each artifact in turn, and after remove.

    One model serves them all, so every artifact also has to give way to the next one.
    """
    with parallel(size):
        model = gpt_model(tiny_models.build(architecture, **(changes or {})).to(dtype), sequence_parallel)
        before = module_ids(model)
        results: dict[str, Any] = {"unpatched": logits(model), "kinds": {}}
        for name, (artifact, comm_mode) in artifacts.items():
            assert lowbit.apply_to_megatron(model, artifact, comm_mode) is model
            results[name], results["kinds"][name] = logits(model), kinds(model)
        assert lowbit.remove(model) is model
        results["removed"], results["same_modules"] = logits(model), module_ids(model) == before
    return results


def refused_tied(rank: int, size: int, artifact: Artifact) -> str:
    """What apply_to_megatron says of a rotated artifact for a model with tied embeddings."""
    with parallel(size):
        model = gpt_model(tiny_models.build("llama", tie_word_embeddings=True))
        try:
            lowbit.apply_to_megatron(model, artifact)
        except LowBitError as error:
            return str(error)
        return "accepted"


def embedded(rank: int, size: int, folder: Path, sequence_parallel: bool) -> dict[str, Tensor]:
    """Logits of the embedded model with an artifact folder applied, and after remove."""
    from transformers import AutoConfig

    from megatron_lowbit.adapters.megatron import model as megatron_model

    with parallel(size):
        config = AutoConfig.from_pretrained(tiny_models.embedded_folder())
        model = megatron_model.build(config, sequence_parallel=sequence_parallel)
        megatron_model.load_weights(model, tiny_models.embedded_folder(), config)
        unpatched = logits(model, config.vocab_size)
        lowbit.apply_to_megatron(model, str(folder))
        patched = logits(model, config.vocab_size)
        lowbit.remove(model)
        return {"unpatched": unpatched, "patched": patched, "removed": logits(model, config.vocab_size)}


def applied_again(rank: int, size: int, artifact: Artifact) -> dict[str, Any]:
    """Applying twice, to a wrapper, and to a list of chunks; then remove by what was given."""
    with parallel(size):
        hf = tiny_models.build("llama")
        model = gpt_model(hf)
        before = module_ids(model)
        lowbit.apply_to_megatron(model, artifact)
        results: dict[str, Any] = {"once": logits(model)}
        lowbit.apply_to_megatron(model, artifact)
        results["twice"] = logits(model)
        lowbit.remove(model)
        results["removed"] = module_ids(model) == before
        wrapper = nn.Module()
        wrapper.module = nn.Module()  # as DistributedDataParallel around Float16Module
        wrapper.module.module = model
        assert lowbit.apply_to_megatron(wrapper, artifact) is wrapper
        results["wrapped"] = logits(model)
        lowbit.remove(wrapper)
        results["unwrapped"] = module_ids(model) == before
        chunks = [wrapper, gpt_model(hf)]
        assert lowbit.apply_to_megatron(chunks, artifact) is chunks
        results["chunks"] = [logits(model), logits(chunks[1])]
        lowbit.remove(chunks)
        results["unlisted"] = module_ids(model) == before and not kinds(chunks[1])
        lowbit.remove(chunks)  # of what is not patched: nothing
        return results


def refused(
    rank: int, size: int, architecture: str, artifacts: dict[str, Artifact], changes: dict[str, Any] | None = None
) -> dict[str, str]:
    """What a GPTModel says to artifacts that do not fit; asserts that each leaves the model as it was."""
    with parallel(size):
        hf = tiny_models.build(architecture, **(changes or {}))
        model, other = gpt_model(hf), gpt_model(hf)
        chunks, messages = [model, other], {}
        before, expected = [module_ids(chunk) for chunk in chunks], logits(model)
        for name, artifact in artifacts.items():
            for given in (model, chunks):
                try:
                    lowbit.apply_to_megatron(given, artifact)
                    messages[name] = "accepted"
                except LowBitError as error:
                    messages[name] = str(error)
                assert [module_ids(chunk) for chunk in chunks] == before, f"{name}: modules were replaced"
                assert all(torch.equal(logits(chunk), expected) for chunk in chunks), f"{name}: other logits"
    return messages


def chunks_of(hf: Any) -> list[Any]:
    """Two GPTModels that share the layers of a model of two, as virtual pipeline stages do."""
    chunks = [gpt_model(hf), gpt_model(hf)]
    for number, chunk in enumerate(chunks):
        chunk.decoder.layers = chunk.decoder.layers[number : number + 1]
    return chunks


def refused_second_chunk(rank: int, size: int, artifacts: dict[str, Artifact]) -> dict[str, tuple[str, bool]]:
    """{artifact: (what is said to a list of chunks, whether all of them are as they were)}."""
    results = {}
    with parallel(size):
        chunks = chunks_of(tiny_models.build("llama"))
        before = [module_ids(chunk) for chunk in chunks]
        for name, artifact in artifacts.items():
            message = "accepted"
            try:
                lowbit.apply_to_megatron(chunks, artifact)
            except LowBitError as error:
                message = str(error)
            results[name] = message, [module_ids(chunk) for chunk in chunks] == before
    return results


def no_gpt_models(rank: int, size: int, artifact: Artifact) -> list[str]:
    """What is said to models of other frameworks."""
    messages = []
    with parallel(size):
        for model in (nn.Linear(2, 2), tiny_models.build("llama"), [nn.Linear(2, 2)]):
            try:
                lowbit.apply_to_megatron(model, artifact)
            except LowBitError as error:
                messages.append(str(error))
    return messages


def refused_folders(rank: int, size: int, folders: dict[str, Path]) -> dict[str, str]:
    messages = {}
    with parallel(size):
        model = gpt_model(tiny_models.build("llama"))
        for name, folder in folders.items():
            try:
                lowbit.apply_to_megatron(model, folder)
                messages[name] = "accepted"
            except LowBitError as error:
                messages[name] = str(error)
    return messages


def pipeline_stages(rank: int, size: int, checkpoint: LowBitCheckpoint) -> dict[str, bool]:
    """{down_proj in Hugging Face: whether this stage's linear_fc2 holds its codes} with one stage per rank."""
    with parallel(1, pp=size):
        model = gpt_model(tiny_models.build("llama"))
        lowbit.apply_to_megatron(model, Artifact(checkpoint))
        (layer,) = model.decoder.layers
        shard = layer.mlp.linear_fc2.low_bit.shards[0]
        names = [name for name in checkpoint.linears if name.endswith("down_proj")]
        return {name: torch.equal(shard.packed_weight, checkpoint.linears[name].packed_weight) for name in names}


def gathers(rank: int, size: int, artifact: Artifact) -> dict[str, Any]:
    """A sequence-parallel model whose plan has ranges for the all-gather; and the same arithmetic without: no sequence
    parallelism, and the inputs of the column-parallel linears rounded by hooks."""
    from recorded_collectives import RecordedCollectives

    plan = artifact.plans[size]
    with parallel(size):
        hf = tiny_models.build("llama")
        model, reference = gpt_model(hf, sequence_parallel=True), gpt_model(hf)
        lowbit.apply_to_megatron(model, artifact)
        lowbit.apply_to_megatron(reference, artifact)
        for index, layer in enumerate(reference.decoder.layers):
            for module, name in ((layer.self_attention.linear_qkv, "self_attn.q"), (layer.mlp.linear_fc1, "mlp.gate")):
                site = plan.gathers[f"model.layers.{index}.{name}_proj"]

                def rounded(module: Any, args: tuple[Tensor], site: Any = site) -> tuple[Tensor]:
                    (x,) = args
                    codes = torch.round(x * site.scale[0].reciprocal() + site.zero_point[0]).clamp(0, 15)
                    y = (codes - site.zero_point[0]) * site.scale[0]
                    y[..., site.bf16_idx] = x[..., site.bf16_idx].bfloat16().float()
                    return (y,)

                module.register_forward_pre_hook(rounded)
        logits(model)  # a reducer's first call also compares plans
        with RecordedCollectives() as recorded:
            patched = logits(model)
        return {"patched": patched, "reference": logits(reference), "calls": recorded.calls}
