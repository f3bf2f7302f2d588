"""Accuracy of an engine on zero-shot tasks: which tasks there are, what lm-eval finds, and what of it is kept.

    accuracy            of a task: acc_norm (log-likelihoods divided by the choices' lengths in bytes) where the task
                        has it, else acc; a group's is what lm-eval aggregates
    mean                over the tasks, each with the same weight; se^2 = sum_t se_t^2 / T^2

A task whose name begins with local_ is one of this folder's tasks/, and reads its questions from evaluation.task_data.
All others are lm-eval's own, from the hub. What is found of a task is kept in <output_dir>/tasks, and not computed
again for the same model, settings, questions and version of lm-eval.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from tqdm import tqdm

from megatron_lowbit.config import LOCAL_TASK, EvaluateConfig, LowBitError, one_line, shown
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.harness import TASKS
from megatron_lowbit.launch.kept import file_name, read_kept, write_kept
from megatron_lowbit.runtime.distributed import PreemptionCheck, on_every_rank, on_rank_zero
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger

BOOTSTRAP = 1000  # resamplings for the standard error of a metric that is no mean
MEASURES = ("acc_norm", "acc", "exact_match")  # the first that a task has is its accuracy


class TaskSuite:
    """The tasks of evaluation.tasks, loaded once and run with every row's model.

    Raises:
        LowBitError: an unknown task, with close names; questions that are missing or damaged; no hub.
    """

    def __init__(self, config: EvaluateConfig, logger: MetricLogger):
        self.section, self.logger = config.evaluation, logger
        self.folder = Path(config.output_dir) / "tasks"
        self.stop = PreemptionCheck()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.manager = on_every_rank(lambda: _manager(self.section.tasks, self.section.task_data))
        self.loaded: dict[str, dict[str, Any]] = {}  # {name asked for: what lm-eval has loaded}
        for name in self.section.tasks:
            self.loaded[name] = on_every_rank(partial(_load, self.manager, name))

    def measure(self, engine: Engine, row: str, model: Mapping[str, Any]) -> dict[str, Any]:
        """Run all tasks with the engine as it is; returns the row's keys accuracy, accuracy_stderr and tasks.

        row: the row's name. model: what else decides the logits, of JSON values.
        """
        import lm_eval
        from lm_eval.evaluator import evaluate

        from megatron_lowbit.launch.harness.model import EngineLM

        # With copies, which come to different numbers of calls, ranks cannot ask each other at every one.
        lm = EngineLM(engine, self.section.batch_size, self.stop if engine.dp_group is None else None)
        found: dict[str, Any] = {}
        questions = self.digests()
        for name, loaded in self.loaded.items():
            self.stop.check("evaluate keeps finished tasks, and goes on with the next when it is run again")
            about = {"model": dict(model), "limit": self.section.task_samples, "lm_eval": lm_eval.__version__}
            about["questions"] = questions[name]
            file = self.folder / file_name(row) / f"{file_name(name)}.json"
            result = on_rank_zero(partial(read_kept, file, about))
            if result is None:
                with _bars():
                    raw = evaluate(lm, loaded, self.section.task_samples, bootstrap_iters=BOOTSTRAP, log_samples=False)
                # Of data-parallel copies, the first alone has the results.
                result = on_rank_zero(partial(write_kept, file, about, None if raw is None else _found(name, raw)))
                self._tell(row, name, result)
            found |= result
        return {**_mean(found), "tasks": found}

    def digests(self) -> dict[str, str]:
        """Return {name asked for: a digest of its questions and of how they are put}."""
        return {name: _digest(loaded["tasks"], self.section.task_samples) for name, loaded in self.loaded.items()}

    def _tell(self, row: str, name: str, result: Mapping[str, Any]) -> None:
        for task, measured in result.items():
            if measured["accuracy"] is not None:
                self.logger.log(row=row, task=task, accuracy=measured["accuracy"], n=measured["n"])
        if env_rank() == 0:
            print(f"{row}: {name} is done", file=sys.stderr, flush=True)


def _manager(names: Sequence[str], task_data: str | None) -> Any:
    """Return lm-eval's TaskManager; its own tasks, whose index takes seconds, are left out where none is asked for."""
    from lm_eval.tasks import TaskManager

    ours = all(name.startswith(LOCAL_TASK) for name in names)
    about = None if task_data is None else {"task_data": task_data}
    manager = TaskManager(include_path=str(TASKS), include_defaults=not ours, metadata=about)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else "; `lm_eval ls tasks` lists them"
            raise LowBitError(f"evaluation.tasks: lm-eval has no task {shown(name)}{hint}")
    return manager


def _load(manager: Any, name: str) -> Any:
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    try:
        with _bars():
            loaded = manager.load([name])
        for task in loaded["tasks"].values():  # as lm-eval's own command
            task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        return loaded
    except LowBitError:
        raise
    except Exception as error:  # whatever the hub, the dataset's builder and the task's own code raise
        raise LowBitError(f"evaluation.tasks: cannot load {name}: {one_line(error)}") from None


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """Leave lm-eval's progress bars out where nobody watches: it draws two for every task."""
    if env_rank() == 0 and sys.stderr.isatty():
        yield
        return
    with contextlib.ExitStack() as patches:
        for module in ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface"):
            patches.enter_context(mock.patch(f"{module}.tqdm", _Quiet))
        yield


class _Quiet(tqdm):
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{**options, "disable": True})


def _digest(tasks: Mapping[str, Any], limit: int | None) -> str:
    """Return a digest of the questions and of how they are put."""
    found = hashlib.sha256()
    for name, task in sorted(tasks.items()):
        how = {key: str(value) for key, value in task.dump_config().items() if " at 0x" not in str(value)}
        found.update(json.dumps([name, str(task.VERSION), how], sort_keys=True).encode())
        for number, document in enumerate(task.eval_docs):
            if limit is not None and number >= limit:
                break
            found.update(json.dumps(document, sort_keys=True, default=str).encode())
    return found.hexdigest()


def _found(name: str, raw: Any) -> dict[str, Any]:
    """Return what lm-eval has found: {task: accuracy, its standard error, n, all metrics, parts}."""
    names = [name] if name in raw["results"] and "sample_len" in raw["results"][name] else sorted(raw["configs"])
    found = {task: _measured(raw["results"][task]) for task in names}
    parts = {task: _measured(raw["results"][task]) for task in sorted(raw["configs"]) if task not in found}
    if parts and names == [name]:
        found[name]["parts"] = parts
    return found


def _measured(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's or group's figures: lm-eval has `metric,filter` and `metric_stderr,filter`, N/A for none."""
    metrics: dict[str, float | None] = {}
    for key, value in result.items():
        metric, comma, _ = key.partition(",")
        if comma and metric not in metrics:
            metrics[metric] = float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    measure = next((metric for metric in MEASURES if metrics.get(metric) is not None), None)
    accuracy = None if measure is None else metrics[measure]
    error = None if measure is None else metrics.get(f"{measure}_stderr")
    return {"accuracy": accuracy, "stderr": error, "measure": measure, "n": result["sample_len"], "metrics": metrics}


def _mean(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the mean accuracy over those tasks that have one, and its standard error."""
    scored = [task for task in tasks.values() if task["accuracy"] is not None]
    if not scored:
        return {"accuracy": None, "accuracy_stderr": None}
    errors = [task["stderr"] for task in scored]
    known = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(scored)
    return {"accuracy": sum(task["accuracy"] for task in scored) / len(scored), "accuracy_stderr": known}
