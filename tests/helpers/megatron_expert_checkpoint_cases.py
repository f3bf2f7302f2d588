"""What workers of a RankPool run for test_megatron_expert_checkpoint.py: `case(rank, size, *args)`."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_cases import logits, module_ids
from megatron_checkpoint_cases import applied, compare, hf_config, plain, writers
from megatron_filler_cases import built, load, script
from megatron_groups import parallel
from megatron_model_cases import said

from megatron_lowbit.artifact import Artifact

Jobs = dict[Path, tuple[Path, Artifact]]  # {checkpoint folder: (model, artifact)}


def save(rank: int, size: int, tp: int, ep: int, jobs: Jobs) -> list[str]:
    """What save_checkpoint says of each."""
    from megatron_lowbit.adapters.megatron.checkpoint import save_checkpoint

    with parallel(tp, ep=ep), writers():
        return [said(save_checkpoint, applied(*job), folder) for folder, job in jobs.items()]


def loaded(rank: int, size: int, tp: int, ep: int, jobs: Jobs) -> dict[str, dict[str, Any]]:
    """{name: a plain model with the checkpoint loaded, against the artifact applied at this size}."""
    from megatron_lowbit.adapters.megatron.checkpoint import load_checkpoint

    with parallel(tp, ep=ep):
        found = {}
        for folder, (model, artifact) in jobs.items():
            mine, other = load_checkpoint(plain(model), folder), applied(model, artifact)
            found[folder.name] = compare(mine, other, hf_config(model).vocab_size)
            found[folder.name]["experts"] = described(mine) == described(other)
        return found


def described(model: Any) -> list[tuple[Any, ...]]:
    """What of the experts in codes is in no tensor."""
    experts = [module for module in model.modules() if type(module).__name__ == "LowBitExperts"]
    assert experts
    return [(str(e), e.act, e.act_bits, e.grouped, e.numbers, e.count, e.replica) for e in experts]


def refused(rank: int, size: int, tp: int, jobs: dict[Path, Path]) -> list[str]:
    """What load_checkpoint says of {model: checkpoint}; asserts that it leaves the model as it is."""
    from megatron_lowbit.adapters.megatron.checkpoint import load_checkpoint

    with parallel(tp):
        found = []
        for folder, checkpoint in jobs.items():
            model = plain(folder)
            before = module_ids(model)
            found.append(said(load_checkpoint, model, checkpoint))
            assert module_ids(model) == before
        return found


def overlapped(rank: int, size: int, model: Path, checkpoint: Path) -> str:
    """What load_checkpoint says where a shared expert's sums go apart; asserts that the model stays as it is."""
    from megatron_lowbit.adapters.megatron.checkpoint import load_checkpoint

    with parallel(size):
        gpt = plain(model)
        before = module_ids(gpt)
        with mock.patch.object(gpt.config, "moe_shared_expert_overlap", True):
            line = said(load_checkpoint, gpt, checkpoint)
        assert module_ids(gpt) == before
        return line


def in_a_script(rank: int, size: int, jobs: dict[str, tuple[Path, Path]]) -> dict[str, Any]:
    """Logits of {ready spec: (model, checkpoint)}, built and loaded as Megatron-LM's scripts do with --load."""
    with parallel(size):
        from megatron_lowbit.adapters.megatron import model as megatron_model

        found = {}
        for name, (model, checkpoint) in jobs.items():
            config = megatron_model.transformer_config(hf_config(model))
            arguments = types.SimpleNamespace(core_transformer_config_from_args=lambda args, found=config: found)
            with (
                script(None, load=str(checkpoint)),
                mock.patch.dict("sys.modules", {"megatron.training.arguments": arguments}),
            ):
                gpt = built(model, name)
                load(gpt, checkpoint)
            found[name] = logits(gpt, hf_config(model).vocab_size)
        return found
