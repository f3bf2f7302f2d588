"""A pytest plugin that runs Megatron-LM's unit tests of distributed checkpoints on two CPU ranks, on our layers or not.

    LOWBIT=1 MEGATRON_LM=DIR python tests/helpers/megatron_unit_tests.py models/test_gpt_model.py

They want eight GPUs and Transformer Engine. Here a layout of eight ranks becomes one of two (TP 2 or PP 2), and every
spec is the local one; with LOWBIT=1 our classes stand in it in place of Megatron's linears.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

RANKS = 2
_built = {"layers": 0, "status": 0}
_without_gpu = ExitStack()


def main(files: list[str]) -> None:
    """Run the files on both ranks; rank 0 prints."""
    from ports import free_port

    root = Path(os.environ["MEGATRON_LM"])
    given = [str(root / "tests" / "unit_tests" / "dist_checkpointing" / file) for file in files]
    here = str(Path(__file__).parent)
    settings = {
        "PYTHONPATH": os.pathsep.join([str(root), here, os.environ.get("PYTHONPATH", "")]),
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"},
        **{"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)},
    }
    options = ["-p", "megatron_unit_tests", "-o", "addopts=", "-rs", "--tb=short"]
    command = [sys.executable, "-m", "pytest", *options, *given]
    ranks = []
    for rank in map(str, range(RANKS)):
        environment = {**os.environ, **settings, "RANK": rank, "LOCAL_RANK": rank}
        output = None if rank == "0" else subprocess.DEVNULL
        ranks.append(subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=output))
    sys.exit(max(rank.wait() for rank in ranks))


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Change what Megatron's conftest is about to import."""
    import megatron.core.utils as core_utils

    core_utils.is_te_min_version = lambda *args, **kwargs: False
    from megatron_lowbit.adapters import megatron_script_on_cpu

    _without_gpu.enter_context(megatron_script_on_cpu._no_gpu())
    from megatron.core import parallel_state
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch import distributed as dist

    start, parallel = dist.init_process_group, parallel_state.initialize_model_parallel
    configure = TransformerConfig.__init__

    def on_cpus(backend: str, **options: Any) -> None:
        start("gloo", **{**options, "timeout": timedelta(seconds=60)})

    def fewer(tp: int = 1, pp: int = 1, *args: Any, **options: Any) -> None:
        tp = min(tp, RANKS)
        parallel(tp, min(pp, RANKS // tp), *args, **options)

    def of_these_groups(self: Any, *args: Any, **options: Any) -> None:
        if parallel_state.model_parallel_is_initialized():
            sizes = {
                "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
                "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
            }
            options |= {name: size for name, size in sizes.items() if name in options}
        configure(self, *args, **options)

    local_spec = gpt_layer_specs.get_gpt_layer_local_spec

    @functools.wraps(local_spec)
    def spec(*args: Any, **options: Any) -> Any:
        found = local_spec(*args, **{key: value for key, value in options.items() if key != "use_te_op_fuser"})
        return _on_ours(found) if os.environ.get("LOWBIT") == "1" else found

    dist.init_process_group, parallel_state.initialize_model_parallel = on_cpus, fewer
    TransformerConfig.__init__ = of_these_groups
    gpt_layer_specs.get_gpt_layer_local_spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec = spec
    import tests.test_utils.python_scripts.download_unit_tests_dataset as assets

    assets.download_and_extract_asset = lambda **options: None


def _on_ours(spec: Any) -> Any:
    from megatron_lowbit.adapters.megatron.spec import lowbit_spec

    _count_layers()
    return lowbit_spec(spec)


@functools.cache
def _count_layers() -> None:
    """Have our layers counted when they are built."""
    from megatron_lowbit.adapters.megatron import layers

    build = layers._LowBitLayer._full_precision

    def counted(self: Any, *args: Any) -> None:
        _built["layers"] += 1
        build(self, *args)

    layers._LowBitLayer._full_precision = counted


def pytest_sessionfinish(exitstatus: int) -> None:
    print(f"\nlow-bit layers built: {_built['layers']}")
    _built["status"] = int(exitstatus)


def pytest_unconfigure() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    queue: Any = filesystem_async._results_queue
    if queue is not None:
        queue._manager.shutdown()  # its process would stay
    sys.stdout.flush()
    os._exit(_built["status"])  # the threads of all these groups end slowly


if __name__ == "__main__":
    main(sys.argv[1:])
