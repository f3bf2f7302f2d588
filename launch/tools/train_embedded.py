"""Train the embedded model: the small Llama that `megatron-lowbit demo` runs without a network.

The text is the Python standard library's own source (io/data.py, `stdlib:train`), the tokenizer a byte-level
BPE trained on the same text, the model a Llama with grouped-query attention (8 query heads, 4 KV heads):
1.3 M parameters, 2.6 MB in bf16. The modules of `stdlib:validation` are never read here.

    python -m megatron_lowbit.launch.tools.train_embedded --steps 4000 --output-dir megatron_lowbit/embedded
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_lowbit.io.data import stdlib_text

VOCAB_SIZE, CONTEXT = 1024, 256
BOS, EOS = "<s>", "</s>"


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: every input is representable, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    # Every text starts with <s>, as every training window does.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT)


def build_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()

    torch.manual_seed(0)
    text = stdlib_text("train")
    tokenizer = train_tokenizer(text)
    tokens = torch.tensor(tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"])
    print(f"{len(text):,} characters, {len(tokens):,} tokens", flush=True)

    model = build_model().train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / args.steps))),
    )
    average = 0.0
    for step in range(args.steps):
        starts = torch.randint(len(tokens) - CONTEXT, (args.batch_size,))
        ids = torch.stack([tokens[s : s + CONTEXT] for s in starts.tolist()])
        ids[:, 0] = tokenizer.bos_token_id
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {average:.4f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
