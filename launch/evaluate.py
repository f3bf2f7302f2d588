"""megatron-lowbit evaluate: the full-precision model, then the low-bit one, on the same text.

perplexity, KL      over all tokens of evaluation.data (KL: of the first evaluation.kl_tokens)
SQNR                of every row-parallel site's output against what it replaced, on the first SQNR_TOKENS tokens
bits/value,         what one rank hands to the collective, each message once. one_shot's all-gather delivers it to
bytes/token         all N - 1 others, so N - 1 times as much crosses a rank's link (see `benchmark collectives`)
accuracy            of the zero-shot tasks in evaluation.tasks (harness/), and its share of full precision's
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from megatron_lowbit.config import EvaluateConfig
from megatron_lowbit.launch.engines.prepare import check_head, load_windows, prepare_artifact
from megatron_lowbit.launch.groups import start_copies
from megatron_lowbit.launch.harness import applied, identity, print_accuracy, suite_of, with_accuracy, with_kept
from megatron_lowbit.launch.rows import check_unused, full_precision_row, low_bit_row, print_rows, row_name
from megatron_lowbit.launch.runner import run_stage
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger

CONFIG = EvaluateConfig


def run(config: EvaluateConfig, logger: MetricLogger) -> dict[str, Any]:
    if config.ablation:
        from megatron_lowbit.launch.studies.ablation import run_ablation

        return run_ablation(config, logger)
    if config.comm_ablation:
        from megatron_lowbit.launch.studies.comm_ablation import run_comm_ablation

        return run_comm_ablation(config, logger)
    if config.token_ablation:
        from megatron_lowbit.launch.studies.wide_tokens import run_token_ablation

        return run_token_ablation(config, logger)
    if config.experiment:
        study = {"lowbit_comm": "lowbit_comm", "qllm": "qllm_table"}[config.experiment]
        return import_module(f"megatron_lowbit.launch.studies.{study}").run(config, logger)
    check_unused(config)
    check_head(config)
    suite = suite_of(config, logger)
    engine = start_copies(config, [config.weights])
    windows = load_windows(engine, config.evaluation, "evaluation", logger)
    model = None if suite is None else identity(engine, config)
    artifact = prepare_artifact(engine, config, logger)
    rows, reference = [], None
    if engine.full_precision:
        row, reference = full_precision_row(engine, windows, config.evaluation, logger)
        rows.append(with_accuracy(row, suite, engine, model))
    plain = artifact.checkpoint is None and engine.tp_size == 1
    if not (plain and rows):
        name = row_name(engine, artifact, config.comm.mode)
        row = low_bit_row(engine, name, artifact, config.comm, windows, config.evaluation, reference, logger)
        rows.append(with_accuracy(row, suite, engine, model, applied(config, artifact)))
    rows = with_kept(rows)
    if env_rank() == 0:
        print_rows(rows)
        print_accuracy(rows)
    return {"rows": rows}


if __name__ == "__main__":
    sys.exit(run_stage("evaluate", sys.argv[1:]))
