"""DeepSpeed on two ranks: the embedded model with quantized weights and low-bit messages between the ranks.

    megatron-lowbit quantize --config configs/debug_cpu.yaml output_dir=runs/example
    deepspeed --num_accelerators 2 examples/deepspeed_tp2.py runs/example

`torchrun --nproc-per-node 2` starts it as well. It needs no GPU and no network.
"""

import argparse
from pathlib import Path

import deepspeed
import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatron_lowbit as lowbit
from megatron_lowbit import embedded

# DeepSpeed's shared-memory all-reduce for CPUs crashes under torchrun. GPUs do not use it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", help="folder that `megatron-lowbit quantize` wrote")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_args()

    folder = Path(embedded.__file__).parent  # any folder or hub id of a causal language model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = deepspeed.init_inference(model, tensor_parallel={"tp_size": 2, "tp_grain_size": 1}, dtype=model.dtype)
    ids = tokenizer("def read_lines(path):\n", return_tensors="pt")["input_ids"]

    with torch.inference_mode():
        before = engine(ids).logits
        lowbit.apply_to_deepspeed(engine, arguments.artifact)  # on every rank
        low_bit = engine(ids).logits
        text = tokenizer.decode(
            engine.module.generate(ids, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True
        )
        seen = lowbit.saturation(engine)  # per site: values sent, and how many lay beyond their calibrated range
        lowbit.remove(engine)  # puts DeepSpeed's own layers back
        after = engine(ids).logits

    if dist.get_rank() == 0:
        print(text)
        print(f"sites with low-bit messages: {len(seen)}")
        print(f"largest change of a logit: {(low_bit - before).abs().max():.3f}")
        print(f"after remove: {'as before' if torch.equal(before, after) else 'CHANGED'}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
