"""Megatron-Core on two ranks: a GPTModel with quantized weights and low-bit messages between the ranks.

    megatron-lowbit quantize --config configs/debug_cpu.yaml output_dir=runs/example
    torchrun --nproc-per-node 2 examples/megatron_tp2.py runs/example

It runs on CPUs too: `initialize` and `build` then use adapters/megatron/cpu_shims.py, which stands in for the GPU that
Megatron-Core takes for granted. A script of your own that has a GPTModel already needs `apply_to_megatron` alone.
"""

import sys
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import distributed as dist
from transformers import AutoConfig, AutoTokenizer

import megatron_lowbit as lowbit
from megatron_lowbit import embedded
from megatron_lowbit.adapters.megatron import model as megatron_model


def main() -> None:
    folder = Path(embedded.__file__).parent  # any folder of a Llama, Mistral, Qwen 2, Qwen 3 or Phi-3
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    megatron_model.initialize(tp=dist.get_world_size(), pp=1, seed=0)
    hf_config = AutoConfig.from_pretrained(folder)
    model = megatron_model.load_weights(megatron_model.build(hf_config), folder, hf_config)

    device = next(model.parameters()).device
    ids = AutoTokenizer.from_pretrained(folder)("def read_lines(path):\n", return_tensors="pt")["input_ids"].to(device)
    positions = torch.arange(ids.shape[1], device=device).unsqueeze(0)

    def logits() -> torch.Tensor:  # [1, length, vocabulary]
        return gather_from_tensor_model_parallel_region(model(ids, positions, None))

    with torch.inference_mode():
        before = logits()
        lowbit.apply_to_megatron(model, sys.argv[1])  # on every rank; a model, or its list of pipeline chunks
        low_bit = logits()
        seen = lowbit.saturation(model)  # per site: values sent, and how many lay beyond their calibrated range
        lowbit.remove(model)  # puts Megatron's own layers back
        after = logits()

    if dist.get_rank() == 0:
        print(f"sites with low-bit messages: {len(seen)}")
        print(f"largest change of a logit: {(low_bit - before).abs().max():.3f}")
        print(f"after remove: {'as before' if torch.equal(before, after) else 'CHANGED'}")
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":  # Megatron's checkpoints start a process that imports this file again
    main()
