"""Megatron-LM's own unit tests on two CPU ranks: without us and on our layers, and whether the same tests pass.

    MEGATRON_LM=DIR python tests/helpers/megatron_unit_tests.py transformer/test_mlp.py dist_checkpointing/models

They want eight GPUs and Transformer Engine. Here a layout of more ranks is cut down to two, and every spec is the local
one, with our classes in the place of Megatron's linears, in full precision (none) and rounded in every forward pass
(W4A8). This file is also the pytest plugin that does so.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import types
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from host_unit_tests import compare, count, sessions
from ports import free_port

RANKS = 2
WITHOUT = "without us"
VARIANTS = (WITHOUT, "none", "W4A8")
LAYOUT = tuple(f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context", "expert_model"))
_without_gpu = ExitStack()


def run(file: str, scheme: str, folder: str) -> None:
    """Run a file's tests on both ranks, of which rank 0 prints."""
    root = Path(os.environ["MEGATRON_LM"])
    settings = {
        "PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"},
        "TORCHDYNAMO_DISABLE": "1",  # the compiler asks the GPU, too; read when a function is decorated
        **{"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "LOWBIT": scheme},
    }
    ranks = [{**settings, "RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(RANKS))]
    options = ["-p", "megatron_unit_tests", "--tb=short"]
    sessions(ranks, folder, root, *options, str(root / "tests" / "unit_tests" / file))


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Change what Megatron's conftest is about to import."""
    import megatron.core.utils as core_utils

    core_utils.is_te_min_version = lambda *args, **kwargs: False
    core_utils.is_fa_min_version = lambda *args, **kwargs: True  # cpu_shims has what the engines call of it
    from megatron_lowbit.adapters import megatron_script_on_cpu

    _without_gpu.enter_context(megatron_script_on_cpu._no_gpu())
    from megatron.core import optimizer, parallel_state
    from megatron.core.models.bert import bert_layer_specs
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
    from torch import distributed as dist

    start, parallel = dist.init_process_group, parallel_state.initialize_model_parallel
    configure, signature, sizes = TransformerConfig.__init__, inspect.signature(parallel), {}

    def on_cpus(backend: str, **options: Any) -> None:
        start("gloo", **{**options, "timeout": timedelta(seconds=60)})

    def fewer(*args: Any, **options: Any) -> None:
        given, free = signature.bind(*args, **options).arguments, RANKS
        for name in LAYOUT:
            asked = given.get(name) or 1
            given[name] = min(asked, free)
            sizes[name], free = (asked, given[name]), free // given[name]
        parallel(**given)

    def of_these_groups(self: Any, *args: Any, **options: Any) -> None:
        if parallel_state.model_parallel_is_initialized():
            options |= {name: size for name, (asked, size) in sizes.items() if options.get(name) == asked}
        configure(self, *args, **options)

    kind = "submodules" if hasattr(gpt_layer_specs, "get_gpt_layer_local_submodules") else "spec"  # 0.19, 0.16
    local = getattr(gpt_layer_specs, f"get_gpt_layer_local_{kind}")
    known = inspect.signature(local).parameters

    @functools.wraps(local)
    def spec(*args: Any, **options: Any) -> Any:
        return _in_variant(local(*args, **{key: value for key, value in options.items() if key in known}))

    describe = MLP.sharded_state_dict

    def described(self: Any, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        return describe(self, prefix, sharded_offsets, ensure_metadata_has_dp_cp_group(metadata))

    MLP.sharded_state_dict = described  # of an MLP alone; Transformer Engine's linears do this themselves
    dist.init_process_group, parallel_state.initialize_model_parallel = on_cpus, fewer
    TransformerConfig.__init__ = of_these_groups
    bert = _in_variant(bert_layer_specs.bert_layer_local_spec)
    for name in ("local", "with_transformer_engine"):
        setattr(gpt_layer_specs, f"get_gpt_layer_{name}_{kind}", spec)
        setattr(bert_layer_specs, f"bert_layer_{name}_spec", bert)
    adam = optimizer.Adam  # torch's, which refuses the lr=None that Transformer Engine's takes
    optimizer.Adam = lambda *args, lr=None, **options: adam(*args, lr=lr or 0.0, **options)
    import tests.test_utils.python_scripts.download_unit_tests_dataset as assets

    assets.download_and_extract_asset = lambda **options: None
    fp8: Any = types.ModuleType("transformer_engine.pytorch.fp8")  # which tests import
    fp8.check_fp8_support, fp8.fp8_autocast = lambda: (False, "no Transformer Engine"), ExitStack
    sys.modules[fp8.__name__] = fp8


def _in_variant(spec: Any) -> Any:
    from megatron_lowbit.adapters.megatron.spec import lowbit_spec

    if os.environ["LOWBIT"] == WITHOUT:
        return spec
    _count_layers()
    return lowbit_spec(spec, os.environ["LOWBIT"])


@functools.cache
def _count_layers() -> None:
    """Have our layers counted when they are built, and their forward passes."""
    from megatron_lowbit.adapters.megatron import layers

    count(layers._LowBitLayer, "_full_precision", "built")
    for layer in (layers.LowBitColumnParallelLinear, layers.LowBitRowParallelLinear):
        count(layer, "forward", "run")


def pytest_unconfigure() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    queue: Any = filesystem_async._results_queue
    if queue is not None:
        queue._manager.shutdown()  # its process would stay
    sys.stdout.flush()
    os._exit(0)  # the threads of all these groups end slowly


if __name__ == "__main__":
    sys.exit(compare(sys.argv[1:], VARIANTS, run))
