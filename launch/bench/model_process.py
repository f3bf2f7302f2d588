"""What `benchmark model` does with one of its two models; by itself, a fresh process that measures that one's memory.

    python -m megatron_lowbit.launch.bench.model_process KIND FOLDER SETTINGS

KIND is bf16, quantized or empty (the frameworks and the model's code, no weight). The process writes FOLDER/KIND.json:

    peak_bytes      the most main memory that it held, loading included; what files are mapped counts
    running_bytes   the most while it prefilled and decoded; None where the system cannot start that count anew
    weight_bytes    of the model's parameters and buffers
    logits          SHA-256 of the bits of all logits, of the prompt and of each token after it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_lowbit.adapters.huggingface.apply import apply_to_huggingface
from megatron_lowbit.adapters.huggingface.skeleton import skeleton
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import StageConfig
from megatron_lowbit.io.files import write_json
from megatron_lowbit.launch.loading import load_model, read_config


class Settings(NamedTuple):
    """source: folder or hub id of the model in full precision; artifact: folder of the quantized one; unrotated: of the
    same without rotation, where there is one."""

    source: str
    artifact: str
    tokens: int
    new_tokens: int
    threads: int
    seed: int
    unrotated: str = ""


def load(kind: str, settings: Settings) -> Any:
    """Load bf16, quantized or unrotated; the last two from their artifacts alone, so that no weight is there in
    bf16."""
    if kind == "bf16":
        return load_model(StageConfig(model=settings.source, dtype="bfloat16"), None, None).eval()
    folder = settings.unrotated if kind == "unrotated" else settings.artifact
    artifact, config = Artifact.load(folder), StageConfig(artifact=folder, dtype="bfloat16")
    model = load_model(config, read_config(folder), artifact.checkpoint).eval()
    return apply_to_huggingface(model, artifact)


def token_ids(settings: Settings, vocabulary: int) -> Tensor:
    """Return random tokens, int64 [1, tokens + new_tokens]: the prompt, and what is decoded whatever a model says."""
    random = torch.Generator().manual_seed(settings.seed)
    return torch.randint(vocabulary, (1, settings.tokens + settings.new_tokens), generator=random)


@torch.inference_mode()
def passes(model: Any, ids: Tensor, tokens: int, every_logit: bool = False) -> Iterator[Tensor]:
    """Yield the logits of the prompt, the first `tokens` of ids [1, tokens + new], and of each token after it, one at a
    time with a KV cache. Of the prompt the last token's, as generation makes them, or all."""
    output = model(input_ids=ids[:, :tokens], use_cache=True, logits_to_keep=0 if every_logit else 1)
    yield output.logits
    for place in range(tokens, ids.shape[1]):
        output = model(
            input_ids=ids[:, place : place + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
        yield output.logits


def timed_passes(model: Any, ids: Tensor, tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds of prefill and those of one token of decode."""
    running, start = passes(model, ids, tokens), clock()
    next(running)
    middle = clock()
    count = sum(1 for _ in running)
    return middle - start, (clock() - middle) / count


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers; a storage that several share counts once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def logits_digest(model: Any, ids: Tensor, tokens: int) -> str:
    digest = hashlib.sha256()
    for logits in passes(model, ids, tokens, every_logit=True):
        digest.update(logits.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# The most memory that this process has held. getrusage also knows what its starter held before exec: not used.


def peak_bytes() -> int | None:
    """Return the peak since the start or the last reset; None where this system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 2**10
    return None


def reset_peak() -> bool:
    """Start to count anew. Returns whether this system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measure(kind: str, settings: Settings) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    if kind == "empty":
        skeleton(read_config(settings.artifact), torch.bfloat16)
        return {"peak_bytes": peak_bytes()}
    model = load(kind, settings)
    weights = weight_bytes(model)  # now: the kernels' order, which a first forward makes, is no buffer
    ids = token_ids(settings, model.get_input_embeddings().num_embeddings)
    loading, can_reset = peak_bytes(), reset_peak()
    timed_passes(model, ids, settings.tokens, time.perf_counter)
    running = peak_bytes()
    return {
        "peak_bytes": None if loading is None or running is None else max(loading, running),
        "running_bytes": running if can_reset else None,
        "weight_bytes": weights,
        "logits": logits_digest(model, ids, settings.tokens),
    }


if __name__ == "__main__":
    _, kind, folder, settings = sys.argv
    write_json(Path(folder) / f"{kind}.json", measure(kind, Settings(**json.loads(settings))))
