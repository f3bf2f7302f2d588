"""lm-eval's own command, with the model megatron_lowbit registered: all arguments are lm-eval's.

    python -m megatron_lowbit.launch.lm_eval --model megatron_lowbit --model_args artifact=DIR,engine=deepspeed,tp=2 \\
        --tasks arc_easy

Several ranks are started by a launcher: torchrun --nproc-per-node 2 -m megatron_lowbit.launch.lm_eval ...; without one,
they are started here. The local_ tasks are found as lm-eval's own; --metadata '{"task_data": "FOLDER"}' names their
files.
"""

from __future__ import annotations

import sys

from megatron_lowbit.config import LowBitError, one_line
from megatron_lowbit.launch.arguments import BAD_INPUT, fail
from megatron_lowbit.launch.harness import TASKS
from megatron_lowbit.launch.inputs import check_package
from megatron_lowbit.launch.layout import ranks_of
from megatron_lowbit.launch.runner import leave_groups, of_a_collective, quiet, start_ranks
from megatron_lowbit.runtime import launcher_env
from megatron_lowbit.runtime.distributed import PeerError
from megatron_lowbit.runtime.launcher_env import launched
from megatron_lowbit.runtime.preemption import REQUEUE, Preempted


def main(argv: list[str]) -> int:
    """Run lm-eval's command; returns its exit code, 2 after one line on standard error for bad input."""
    code = 1
    try:
        launcher_env.adopt()
        check_package("eval")
        code = _run(argv)
    except PeerError:
        code = BAD_INPUT
    except LowBitError as error:
        code = fail(str(error))
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        code = fail(one_line(error))
    except RuntimeError as error:
        if not of_a_collective(error):
            raise
        code = fail(f"a collective failed: another rank has ended ({one_line(error)})")
    except Preempted as stop:
        code = REQUEUE
        print(f"megatron-lowbit: stopped by a signal: {stop}", file=sys.stderr, flush=True)
    finally:
        leave_groups(code)
    return code


def _run(argv: list[str]) -> int:
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from megatron_lowbit.launch.harness.model import NAME, config_of

    quiet()
    setup_logging()
    paths = [] if "--include_path" in argv or "--model" not in argv else ["--include_path", str(TASKS)]
    sys.argv = ["lm_eval", *argv, *paths]
    command = HarnessCLI()
    arguments = command.parse_args()
    if getattr(arguments, "model", None) == NAME and not launched():
        config = config_of(arguments.model_args or {})
        size = ranks_of("evaluate", config)
        if size > 1 or config.engine != "huggingface":
            return start_ranks("lm_eval", argv, size)
    command.execute(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
