"""DeepSpeed's own unit tests of AutoTP on CPU ranks: without us and on our layers, and whether the same tests pass.

    DEEPSPEED=DIR python tests/helpers/deepspeed_unit_tests.py model_parallelism/test_autotp_training.py

DIR is DeepSpeed's repository, of which the tests alone are used. They look at DeepSpeed's own layers afterwards, so
these stay: on our layers (layers) every LinearAllreduce computes as the row-parallel layer that apply_to_deepspeed puts
in its place, with partial sums in bfloat16. This file is also the module that each rank imports first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from host_unit_tests import compare, count, sessions

WITHOUT = "without us"
RANKS = 4


def run(file: str, variant: str, folder: str) -> None:
    """Run a file's tests, which start their ranks themselves."""
    tests = Path(os.environ["DEEPSPEED"]) / "tests"
    settings = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(tests), os.environ.get("PYTHONPATH", "")]),
        **{"LOWBIT": variant, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"},
        **{"LOCAL_SIZE": str(RANKS), "DS_UNITTEST_TIMEOUT": "180"},  # how many devices there are
    }
    sessions([settings], folder, tests, "-p", "deepspeed_unit_tests", "--tb=short", str(tests / "unit" / file))


def pytest_configure() -> None:
    """Have the server that forks the ranks import this module first: each would take long to import DeepSpeed."""
    import multiprocessing

    multiprocessing.set_forkserver_preload(["deepspeed_unit_tests"])


def _on_ours() -> None:
    """Let DeepSpeed's row-parallel layers compute as ours do."""
    from deepspeed.module_inject.layers import LinearAllreduce

    from megatron_lowbit.adapters import deepspeed as adapter
    from megatron_lowbit.adapters.patching import Reducers
    from megatron_lowbit.artifact import Artifact
    from megatron_lowbit.layers.linear import QuantRowParallelLinear

    count(QuantRowParallelLinear, "__init__", "built")
    count(QuantRowParallelLinear, "forward", "run")

    def forward(self: Any, x: Any) -> Any:
        group = self.mp_group
        reducer = None if group is None else Reducers.of(Artifact(), self.tp_world_size, "bf16").real("", group)
        return adapter.row_parallel("", self, None, reducer)(x)

    LinearAllreduce.forward = forward


def _in_rank() -> None:
    from megatron_lowbit.adapters.deepspeed import import_deepspeed

    import_deepspeed()
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.runtime.engine import DeepSpeedEngine

    choose = DeepSpeedEngine.get_optimizer_configuration

    def torch_adam(self: Any, parameters: dict[str, Any], *args: Any, **options: Any) -> Any:
        parameters["torch_adam"] = True  # DeepSpeed's own would be compiled, for minutes
        return choose(self, parameters, *args, **options)

    DeepSpeedEngine.get_optimizer_configuration = torch_adam
    CPU_Accelerator.current_device = lambda self: "cpu"  # it gives the rank, which is no device
    if os.environ["LOWBIT"] != WITHOUT:
        _on_ours()


if __name__ == "__main__":
    sys.exit(compare(sys.argv[1:], [WITHOUT, "layers"], run))
if "LOWBIT" in os.environ:
    _in_rank()
