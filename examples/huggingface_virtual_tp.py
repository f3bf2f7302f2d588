"""Plain Hugging Face, one process: what eight tensor-parallel ranks would compute, before you rent them.

    megatron-lowbit quantize --config configs/debug_cpu.yaml comm.tp_sizes=[8] output_dir=runs/example8
    python examples/huggingface_virtual_tp.py runs/example8

The partial sums and the messages of all eight ranks are simulated bit for bit.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatron_lowbit as lowbit
from megatron_lowbit import embedded


def main() -> None:
    folder = Path(embedded.__file__).parent  # any folder or hub id of a causal language model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer("def read_lines(path):\n", return_tensors="pt")["input_ids"]

    with torch.inference_mode():
        before = model(ids).logits
        lowbit.apply_to_huggingface(model, sys.argv[1], virtual_tp=8)
        low_bit = model(ids).logits
        text = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
        seen = lowbit.saturation(model)  # per site: values sent, and how many lay beyond their calibrated range
        lowbit.remove(model)  # puts the model's own layers back
        after = model(ids).logits

    print(text)
    print(f"sites with low-bit messages: {len(seen)}")
    print(f"largest change of a logit: {(low_bit - before).abs().max():.3f}")
    print(f"after remove: {'as before' if torch.equal(before, after) else 'CHANGED'}")


if __name__ == "__main__":
    main()
