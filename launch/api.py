"""The commands as functions: quantize, calibrate, evaluate and generate, in this process.

They run what `megatron-lowbit quantize` and the others run, write the same files, and return what was found. A script
that a launcher has started on several ranks calls them on every rank.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import LowBitError, StageConfig, shown
from megatron_lowbit.launch.arguments import CONFIGS
from megatron_lowbit.launch.inputs import check_inputs
from megatron_lowbit.launch.layout import check_layout, ranks_of
from megatron_lowbit.launch.tables import number, table_text
from megatron_lowbit.runtime import launcher_env
from megatron_lowbit.runtime.distributed import on_rank_zero
from megatron_lowbit.runtime.launcher_env import env_rank, launched
from megatron_lowbit.runtime.rendezvous import join
from megatron_lowbit.temporary import scratch_folder

# Of every stage: {key of its rows: how a number of it is shown}
_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "quantize": {"name": "", "linears": ",d", "bytes": ",d", "sites": ",d", "communication": ""},
    "calibrate": {"name": "", "tp_size": "d", "sites": ",d", "communication": ""},
    "evaluate": {
        **{"name": "", "tp": "d", "perplexity": ".3f", "kl": ".5f"},
        **{"sqnr_db": ".1f", "bits_per_value": ".3f", "bytes_per_token": ",.0f"},
        **{"accuracy": ".4f", "accuracy_kept_percent": ".1f"},
    },
    "generate": {"prompt": "", "text": "", "new_tokens": "d"},
}


@dataclass(frozen=True)
class StageResult:
    """What a stage found and wrote. Its repr is a table, in a notebook one of HTML.

    Args:
        stage: the command's name.
        folder: its output_dir, with <stage>.json, <stage>.yaml, metrics.jsonl and what artifact it made.
        rows: the figures, a dict per row of the command's table; on ranks other than 0 of a launched job they may be
            fewer.
        record: what <stage>.json holds: config, rows, data, seconds, environment; empty on ranks other than 0.

    Example:
        >>> import megatron_lowbit as lowbit
        >>> result = lowbit.quantize("embedded", scheme="W4A8", output_dir="quantized")
        >>> result.stage, result.folder.name, result.rows[0]["linears"]
        ('quantize', 'quantized', 42)
        >>> result.artifact().checkpoint.scheme_name
        'W4A8'
    """

    stage: str
    folder: Path
    rows: list[dict[str, Any]]
    record: dict[str, Any] = field(default_factory=dict)

    def artifact(self) -> Artifact:
        """Load the artifact that the stage wrote.

        Returns:
            The Artifact of `folder`.

        Raises:
            LowBitError: the stage writes none, or it is damaged.
        """
        return Artifact.load(self.folder)

    def __repr__(self) -> str:
        names, rows = self._table()
        return f"{self._title()}\n{table_text(names, rows)}".rstrip()

    def _repr_html_(self) -> str:
        names, rows = self._table()
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<p>{escape(self._title())}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _title(self) -> str:
        seconds = self.record.get("seconds")
        return f"{self.stage}: {self.folder}" + ("" if seconds is None else f", {seconds:.1f} s")

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Return the columns that have a value in some row, and the cells."""
        forms = {key: form for key, form in _COLUMNS[self.stage].items() if any(key in row for row in self.rows)}
        rows = [[_cell(row.get(key), form) for key, form in forms.items()] for row in self.rows]
        return list(forms), rows


def _cell(value: Any, form: str) -> str:
    return str(value) if isinstance(value, str) else number(value, form)


def quantize(
    model: Any,
    data: str | Path | None = None,
    scheme: str = "W4A8",
    output_dir: str | Path = "runs/lowbit",
    tokenizer: Any = None,
    **config: Any,
) -> StageResult:
    """Quantize a model and write the artifact, as `megatron-lowbit quantize` does.

    Without `data` weights are rounded to the nearest code; with it they are quantized by QLLM (arXiv 2310.08041), and
    communication plans (arXiv 2411.07942) are written too.

    Args:
        model: folder or hub id of a causal language model; "embedded", the small one of this package; or a model of
            transformers, in full precision and unpatched, which needs `tokenizer`. It is not changed.
        data: calibration text: hub id[:config[:split]], a file of text or records, a folder, or stdlib:calibration.
        scheme: bits of weights and activations: W4A16, W4A8, W4A4, W6A6, W8A8, or autoA16, autoA8, autoA4.
        output_dir: folder of the artifact, results and log.
        tokenizer: of transformers, where `model` is a model and no folder.
        config: other keys of the command: sections as dicts, weights={"rotation": "hadamard"}, or with dots,
            **{"weights.rotation": "hadamard"}.

    Returns:
        The StageResult: a row of the checkpoint's size, then one per communication plan.

    Raises:
        LowBitError: bad input, in one line with the value and the fix; several ranks without a launcher.

    Example:
        >>> import megatron_lowbit as lowbit
        >>> result = lowbit.quantize("embedded", scheme="W4A16", output_dir="rounded")
        >>> result.rows[0]["name"]
        'W4A16'
    """
    given = nested(config)
    _put(given, "weights", scheme=scheme)
    _put(given, "calibration", data=_name("data", data))
    with _folder_of(model, tokenizer) as folder:
        return _run("quantize", {**given, "model": folder, "output_dir": _name("output_dir", output_dir)})


def calibrate(
    model: Any,
    data: str | Path,
    tp_sizes: Sequence[int] | None = None,
    output_dir: str | Path = "runs/lowbit",
    tokenizer: Any = None,
    **config: Any,
) -> StageResult:
    """Measure the ranges that low-bit communication quantizes with, and write a plan for each number of ranks.

    Source: arXiv 2411.07942, as `megatron-lowbit calibrate` does it.

    Args:
        model: folder or hub id of a causal language model; "embedded"; or a model of transformers, which needs
            `tokenizer`.
        data: calibration text: hub id[:config[:split]], a file of text or records, a folder, or stdlib:calibration.
        tp_sizes: numbers of tensor-parallel ranks; None: those up to 8 that divide the model.
        output_dir: folder of the plans, results and log.
        tokenizer: of transformers, where `model` is a model and no folder.
        config: other keys of the command: sections as dicts, comm={"bits": 5}, or with dots, **{"comm.bits": 5}.

    Returns:
        The StageResult, with a row per plan.

    Raises:
        LowBitError: bad input, in one line with the value and the fix; several ranks without a launcher.

    Example:
        >>> import megatron_lowbit as lowbit
        >>> text = {"samples": 2, "sequence_length": 32}
        >>> result = lowbit.calibrate("embedded", "stdlib:calibration", [2], "calibrated", calibration=text)
        >>> result.rows[0]["tp_size"]
        2
    """
    given = nested(config)
    _put(given, "calibration", data=_name("data", data))
    if tp_sizes is not None:
        _put(given, "comm", tp_sizes=list(tp_sizes))
    with _folder_of(model, tokenizer) as folder:
        return _run("calibrate", {**given, "model": folder, "output_dir": _name("output_dir", output_dir)})


def evaluate(
    model: Any = None,
    data: str | Path | None = None,
    artifact: str | Path | None = None,
    output_dir: str | Path = "runs/lowbit",
    tokenizer: Any = None,
    **config: Any,
) -> StageResult:
    """Measure perplexity, KL divergence to full precision, SQNR and bytes on the wire, as `megatron-lowbit evaluate`.

    Args:
        model: folder or hub id of the full-precision model, "embedded", or a model of transformers, which needs
            `tokenizer`; None: the artifact alone, without a comparison.
        data: text to measure on: hub id[:config[:split]], a file of text or records, a folder, or stdlib:validation.
        artifact: folder that quantize or calibrate wrote; None: the model as it is.
        output_dir: folder of results and log.
        tokenizer: of transformers, where `model` is a model and no folder.
        config: other keys of the command: sections as dicts, evaluation={"samples": 64}, or with dots,
            **{"evaluation.samples": 64}; engine="deepspeed" with tp=2 on two ranks.

    Returns:
        The StageResult, with a row for full precision and one for the artifact.

    Raises:
        LowBitError: bad input, in one line with the value and the fix; several ranks without a launcher.

    Example:
        >>> import megatron_lowbit as lowbit
        >>> text = {"samples": 2, "sequence_length": 32}
        >>> result = lowbit.evaluate("embedded", "stdlib:validation", output_dir="evaluated", evaluation=text)
        >>> result.rows[0]["name"], result.rows[0]["perplexity"] > 1
        ('full precision', True)
    """
    given = nested(config)
    _put(given, "evaluation", data=_name("data", data))
    given |= {"artifact": _name("artifact", artifact), "output_dir": _name("output_dir", output_dir)}
    with _folder_of(model, tokenizer) as folder:
        return _run("evaluate", {**given, "model": folder})


def generate(
    prompt: str,
    artifact: str | Path | None = None,
    model: str | Path | None = None,
    output_dir: str | Path = "runs/lowbit",
    **config: Any,
) -> StageResult:
    """Continue a prompt with a low-bit model, as `megatron-lowbit generate` does.

    Args:
        prompt: text to continue.
        artifact: folder that quantize or calibrate wrote; None: the model as it is.
        model: folder or hub id of the full-precision model; None: the artifact alone.
        output_dir: folder of results and log.
        config: other keys of the command, such as max_new_tokens=32, temperature=0.7; sections as dicts.

    Returns:
        The StageResult; its row has prompt, text, and the new token ids in tokens.

    Raises:
        LowBitError: bad input, in one line with the value and the fix; several ranks without a launcher.

    Example:
        >>> import megatron_lowbit as lowbit
        >>> result = lowbit.generate("def f(", model="embedded", output_dir="generated", max_new_tokens=4)
        >>> len(result.rows[0]["tokens"])
        4
    """
    given = nested(config)
    given |= {"prompt": prompt, "artifact": _name("artifact", artifact)}
    given |= {"model": _name("model", model), "output_dir": _name("output_dir", output_dir)}
    return _run("generate", given)


def _run(stage: str, values: dict[str, Any]) -> StageResult:
    """Run a stage on this rank with a config of these values."""
    launcher_env.adopt()
    config: StageConfig = CONFIGS[stage](**values)
    check_layout(stage, config, None)
    check_inputs(stage, config)
    ranks = ranks_of(stage, config)
    if ranks > 1 and not launched():
        raise LowBitError(
            f"{stage} with this config runs on {ranks} ranks: start the script with torchrun --nproc-per-node {ranks}, "
            "deepspeed or srun"
        )
    from megatron_lowbit.launch import runner  # and with it torch

    module = import_module(f"megatron_lowbit.launch.{stage}")
    # What a command says on the way is no result: it goes where progress goes.
    with contextlib.redirect_stdout(sys.stderr):
        record = runner.perform(stage, module, config)
    return StageResult(stage, Path(config.output_dir), record["rows"], record if env_rank() == 0 else {})


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with those of keys with dots in sections of their own."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, dot, leaf = key.partition(".")
        if dot:
            _put(nested, section, **{leaf: value})
        elif isinstance(value, Mapping):
            _put(nested, key, **value)
        else:
            nested[key] = value
    return nested


def _put(values: dict[str, Any], section: str, **keys: Any) -> None:
    """Set keys of a section; None leaves what is there. Raises LowBitError for a key that has another value already."""
    there = values.setdefault(section, {})
    if not isinstance(there, dict):
        raise LowBitError(f"{section}={shown(there)} is no section; pass a dict, such as {section}={{...}}")
    for key, value in keys.items():
        if value is None:
            continue
        if key in there and there[key] != value:
            raise LowBitError(f"{section}.{key} is given twice, as {shown(there[key])} and {shown(value)}")
        there[key] = value


def _name(key: str, value: Any) -> str | None:
    """Return a folder, file or hub id as text, None as it is; LowBitError for what is neither text nor a Path."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise LowBitError(f"{key} is of type {type(value).__name__}: pass a string or a Path")


@contextlib.contextmanager
def _folder_of(model: Any, tokenizer: Any) -> Iterator[str | None]:
    """Yield the folder or hub id of a model; one that is in memory is saved for as long as the context lasts."""
    if model is None or isinstance(model, str | Path):
        if tokenizer is not None:
            raise LowBitError("tokenizer goes with a model in memory; a folder or hub id has its own: leave it out")
        yield None if model is None else str(model)
        return
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise LowBitError(
            f"tokenizer is a {type(tokenizer).__name__}: pass the one of AutoTokenizer.from_pretrained(FOLDER)"
        )
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise LowBitError(f"model is a {type(model).__name__}: pass a folder, a hub id or a model of transformers")
    if tokenizer is None:
        raise LowBitError("a model in memory has no tokenizer: pass tokenizer=, or the model's folder")
    if launched():
        join()
    with contextlib.ExitStack() as stack:
        folder = on_rank_zero(lambda: str(stack.enter_context(scratch_folder())))

        def save() -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        on_rank_zero(save)
        yield folder
        on_rank_zero(lambda: None)  # rank 0 removes the folder once nobody reads it
