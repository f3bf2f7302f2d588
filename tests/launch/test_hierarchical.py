"""The ablation's map over a group of blocks: what is evaluated is what was trained."""

from __future__ import annotations

import pytest
import torch
from commands import CALIBRATION, run_here
from safetensors.torch import load_file
from tiny_models import two_blocks
from torch import Tensor, nn

from megatron_lowbit.adapters.huggingface.apply import decoder_blocks
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import EvaluateConfig, load_config
from megatron_lowbit.launch import qllm
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.studies import hierarchical


class Block(nn.Module):
    """Put out 2 x + 1, in a tuple or alone."""

    def __init__(self, in_tuple: bool):
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, hidden_states: Tensor):
        output = 2 * hidden_states + 1
        return (output, "more") if self.in_tuple else output


@pytest.mark.parametrize("in_tuple", (False, True))
@pytest.mark.parametrize("by_name", (False, True))
def test_the_map_is_added_at_the_end_of_its_group(in_tuple, by_name):
    """2 (2 x + 1) + 1 + U V x, in whole numbers; the next group adds nothing."""
    blocks = [Block(in_tuple) for _ in range(3)]
    v, u = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [-1.0]])
    handles = hierarchical.add_map(blocks[0], blocks[1], v, u)
    x = torch.tensor([[[1.0, 5.0]]])

    def run() -> list[list[float]]:
        hidden, found = x, []
        for block in blocks:
            output = block(hidden_states=hidden) if by_name else block(hidden)
            hidden = output[0] if in_tuple else output
            found.append(hidden.flatten().tolist())
        return found

    assert run() == [[3.0, 11.0], [7 + 3 * 11.0, 23 - 11.0], [2 * 40 + 1.0, 2 * 12 + 1.0]]
    for handle in handles:
        handle.remove()
    assert run() == [[3.0, 11.0], [7.0, 23.0], [15.0, 47.0]]


def test_what_is_evaluated_is_what_was_trained(tmp_path, monkeypatch):
    """The hidden states after all blocks, under the artifact and its maps, are the pipeline's last quantized stream."""
    quantizers = []

    class Kept(hierarchical.HierarchicalQuantizer):
        def __init__(self, *args):
            super().__init__(*args)
            quantizers.append(self)

    monkeypatch.setattr(qllm, "BlockwiseQuantizer", Kept)
    settings = [
        *CALIBRATION,
        "calibration.samples=4",
        "correction.holdout=0",
        "reassembly.mode=none",
        "correction.blocks_per_group=1",
    ]
    command = ["quantize", f"model={two_blocks()}", "weights.scheme=W4A4", *settings, f"output_dir={tmp_path}"]
    assert run_here(*command) == 0
    (quantizer,) = quantizers
    maps = load_file(tmp_path / hierarchical.FILE)
    assert set(maps) == {"0-0.u", "0-0.v", "1-1.u", "1-1.v"} and all(tensor.any() for tensor in maps.values())
    engine = start_engine(load_config(EvaluateConfig, None, [f"artifact={tmp_path}"]))
    engine.apply(Artifact.load(tmp_path))
    hidden: list[Tensor] = []
    engine.module.model.norm.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    with torch.inference_mode():
        engine(quantizer.share.ids)
        with hierarchical.maps_of(tmp_path, decoder_blocks(engine.module)[1]):
            engine(quantizer.share.ids)
    trained = quantizer.streams.quantized.values
    without, same = (((h - trained).norm(dim=-1) / trained.norm(dim=-1)).flatten().median().item() for h in hidden)
    # Of most tokens: float32 noise at a rounding boundary moves an activation's code, and later tokens with it.
    assert same < 1e-4 < 1e-2 < without
