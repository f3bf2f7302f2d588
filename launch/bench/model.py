"""megatron-lowbit benchmark model: tokens per second and memory of a quantized model against the same in bf16.

Weights are rounded to nearest (weights.scheme), which no speed and no size depends on, and run by apply_to_huggingface
in one process. A round runs both models on the same tokens, the prompt at once (prefill) and then one token at a time
with a KV cache (decode); rounds alternate in order, and ratios are medians over the rounds.

    prefill, decode   tokens per second; ratio: of the quantized model to bf16
    peak memory       of a fresh process that loads and runs one of them (model_process.py), minus that of one that only
                      imports; ratio: quantized through bf16
    running memory    the same, of prefill and decode alone: not of loading
    weights           bytes of parameters and buffers

With weights.rotation each round runs a third model, the same without it: what R3 and R4 take of the rotated one's time.

A third process computes the quantized model's logits with MEGATRON_LOWBIT_KERNELS=reference: with quantized activations
they have to be the same bits, else the run fails. (weights.lm_head_bits is weight-only: its bf16 products are summed in
float32, in another order than the reference's.)
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.adapters.huggingface.apply import model_config
from megatron_lowbit.adapters.huggingface.head import quantize_head
from megatron_lowbit.config import LowBitError, StageConfig, one_line
from megatron_lowbit.io.files import read_json
from megatron_lowbit.launch import runner
from megatron_lowbit.launch.arguments import fail
from megatron_lowbit.launch.bench.arguments import parse_model
from megatron_lowbit.launch.bench.config import RANDOM_LLAMA, BenchmarkModelConfig
from megatron_lowbit.launch.bench.model_process import Settings, load, timed_passes, token_ids
from megatron_lowbit.launch.bench.report import circumstances, clock, markdown, print_heading
from megatron_lowbit.launch.engines.prepare import round_weights
from megatron_lowbit.launch.inputs import model_name
from megatron_lowbit.launch.loading import load_model
from megatron_lowbit.launch.tables import Justify
from megatron_lowbit.quant.affine import Scheme
from megatron_lowbit.quant.head import first_tokens
from megatron_lowbit.runtime.distributed import PreemptionCheck, seed_everything
from megatron_lowbit.runtime.metrics import MetricLogger, progress
from megatron_lowbit.runtime.say import say
from megatron_lowbit.temporary import scratch_folder

CONFIG = BenchmarkModelConfig
KINDS = ("bf16", "quantized")


def main(argv: list[str]) -> int:
    """Run `megatron-lowbit benchmark model ARGV`; returns the exit code."""
    try:
        config = parse_model(argv)
        return runner.run_rank("benchmark", sys.modules[__name__], config)
    except LowBitError as error:
        return fail(str(error))


def run(config: BenchmarkModelConfig, logger: MetricLogger) -> dict[str, Any]:
    about, before = circumstances(), torch.get_num_threads()
    torch.set_num_threads(config.threads)
    rows: list[dict[str, Any]] = []
    checks: dict[str, bool] = {}
    try:
        for name in dict.fromkeys(config.models):
            measured, checks[name] = measure_model(config, name)
            rows += measured
            logger.log(row=name, **{f"{row['what']} ratio": row["ratio"] for row in measured if row["ratio"]})
    finally:
        torch.set_num_threads(before)
    print_rows(config, rows, checks, about)
    wrong = [name for name, same in checks.items() if not same]
    if wrong and Scheme.parse(config.weights.scheme).act_bits < 16 and not config.weights.lm_head_bits:
        raise RuntimeError(f"the logits of {', '.join(wrong)} are not those of the reference op")
    return {"rows": rows, "same_bits": checks, **about}


# The measurement


def measure_model(config: BenchmarkModelConfig, name: str) -> tuple[list[dict[str, Any]], bool]:
    """Return the rows of one of config.models, and whether its logits are the reference's bits."""
    with scratch_folder() as folder:
        settings, parameters = prepare(config, name, folder)
        of = {kind: in_a_process(kind, folder, settings) for kind in ("empty", *KINDS)}
        expected = in_a_process("quantized", folder, settings, MEGATRON_LOWBIT_KERNELS="reference")
        models = {kind: load(kind, settings) for kind in (*KINDS, *(["unrotated"] if settings.unrotated else []))}
        seconds = time_models(config, models, settings)
    rows: list[dict[str, Any]] = []
    for what, tokens in (("prefill", settings.tokens), ("decode", 1)):
        mine = {kind: [pair[what == "decode"] for pair in pairs] for kind, pairs in seconds.items()}
        row: dict[str, Any] = {kind: tokens / statistics.median(mine[kind]) for kind in KINDS}
        pairs = zip(mine["bf16"], mine["quantized"], strict=True)
        row |= {"ratio": statistics.median(a / b for a, b in pairs), "seconds": mine}
        if settings.unrotated:
            pairs = zip(mine["unrotated"], mine["quantized"], strict=True)
            row["rotation_share"] = statistics.median(1 - a / b for a, b in pairs)
        rows.append({"what": what, **row})
    for what, key in (("peak memory", "peak_bytes"), ("running memory", "running_bytes"), ("weights", "weight_bytes")):
        empty = 0 if key == "weight_bytes" else of["empty"]["peak_bytes"]
        known = None not in (empty, *(of[kind][key] for kind in KINDS))
        held = {kind: of[kind][key] - empty if known else None for kind in KINDS}
        rows.append({"what": what, **held, "ratio": (held["quantized"] or 0) / held["bf16"] if held["bf16"] else None})
    shared = {"model": name, "parameters": parameters, "tokens": settings.tokens, "new_tokens": settings.new_tokens}
    return [{**shared, **row} for row in rows], of["quantized"]["logits"] == expected["logits"]


def prepare(config: BenchmarkModelConfig, name: str, folder: Path) -> tuple[Settings, int]:
    """Make the random model, if it is that, and the artifact, in `folder`. Returns (settings, parameters)."""
    source, artifact = folder / "model", folder / "artifact"
    if config.weights.lm_head_bits and config.weights.rotation != "none":
        raise LowBitError("benchmark model takes weights.lm_head_bits or weights.rotation; leave one of them out")
    if name == "random":
        random_model(config).save_pretrained(source)
    where = str(source) if name == "random" else model_name(name)
    model = load_model(StageConfig(model=where, dtype="bfloat16"), None, None).eval()
    context = getattr(model_config(model), "max_position_embeddings", None) or config.tokens + config.new_tokens
    tokens = min(config.tokens, context - config.new_tokens)
    if tokens < 1:
        raise LowBitError(f"{name}: new_tokens={config.new_tokens} leave no room for a prompt among its {context}")
    artifact.mkdir()
    model.config.save_pretrained(artifact)
    settings = Settings(where, str(artifact), tokens, config.new_tokens, config.threads, config.seed)
    if config.weights.rotation != "none":
        unrotated = folder / "unrotated"
        unrotated.mkdir()
        model.config.save_pretrained(unrotated)
        round_weights(model, config.weights.model_copy(update={"rotation": "none"}), torch.bfloat16).save(unrotated)
        settings = settings._replace(unrotated=str(unrotated))
    checkpoint = round_weights(model, config.weights, torch.bfloat16)
    if config.weights.lm_head_bits:
        ids = token_ids(settings, model_config(model).vocab_size)
        checkpoint = quantize_head(model, checkpoint, config.weights.lm_head_bits, first_tokens(ids, ids >= 0))
    checkpoint.save(artifact)
    return settings, sum(parameter.numel() for parameter in model.parameters())


def random_model(config: BenchmarkModelConfig) -> Any:
    """Build the random Llama in bf16, or what `architecture` makes of it.

    Raises LowBitError for fields that no config class takes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of save_pretrained
    fields = {**RANDOM_LLAMA, **config.architecture}
    seed_everything(config.seed)
    try:
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=torch.bfloat16
        )
    except Exception as error:  # whatever the classes raise
        raise LowBitError(f"architecture: {one_line(error)}; give the fields of the model's config.json") from None


def in_a_process(kind: str, folder: Path, settings: Settings, **environ: str) -> dict[str, Any]:
    """Return what a process of its own measures of a model (model_process.py)."""
    command = [
        sys.executable,
        "-m",
        "megatron_lowbit.launch.bench.model_process",
        kind,
        str(folder),
        json.dumps(settings._asdict()),
    ]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONSAFEPATH": "1", **environ}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the process of the {kind} model ended with code {done.returncode}:\n{done.stderr}")
    return read_json(folder / f"{kind}.json")


def time_models(
    config: BenchmarkModelConfig, models: dict[str, Any], settings: Settings
) -> dict[str, list[tuple[float, float]]]:
    """Return {kind: [(seconds of prefill, seconds of a token of decode)]}, one pair a round; a first round warms up."""
    ids = token_ids(settings, models["bf16"].get_input_embeddings().num_embeddings)
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in models}
    rounds = PreemptionCheck().each(range(-1, config.repeats))
    for number in progress(rounds, config.repeats + 1, "timing"):
        for kind in models if number % 2 else reversed(models):
            measured = timed_passes(models[kind], ids, settings.tokens, clock(config.threads))
            if number >= 0:
                seconds[kind].append(measured)
    return seconds


# What is shown


def print_rows(
    config: BenchmarkModelConfig, rows: list[dict[str, Any]], checks: dict[str, bool], about: dict[str, Any]
) -> None:
    scheme = config.weights.scheme
    threads = f"{config.threads} thread{'s' if config.threads > 1 else ''}"
    print_heading(f"Models in {scheme} against bf16, {threads}", about)
    print()
    columns: dict[str, Justify] = {"model": "left", "what": "left", "bf16": "right", scheme: "right", "ratio": "right"}
    cells = []
    for row in rows:
        rate = row["what"] in ("prefill", "decode")
        what = f"prefill {row['tokens']}" if row["what"] == "prefill" else row["what"]
        figures = (figure(row[kind], rate) for kind in KINDS)
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
        model = f"{row['model']}, {row['parameters'] / 1e6:,.0f}M"
        cells.append((model, f"{what}, {'tokens/s' if rate else 'MiB'}", *figures, ratio))
    print(markdown(columns, cells))
    notes = [
        f"The logits of {name} in {scheme} are bit for bit those of the reference op: {'yes' if same else 'no'}."
        for name, same in checks.items()
    ]
    notes += [
        f"Rotating online takes {row['rotation_share']:.1%} of {row['model']}'s {row['what']}."
        for row in rows
        if "rotation_share" in row
    ]
    measure = "CPU time" if config.threads == 1 else "time that passes"
    notes.append(
        f"Times are {measure}; medians of {config.repeats} interleaved rounds. Memory is that of a process alone."
    )
    for note in notes:
        print()
        say(note)


def figure(value: float | None, rate: bool) -> str:
    """Return tokens per second, or bytes as MiB."""
    return "-" if value is None else f"{value if rate else value / 2**20:,.1f}"
