"""Runs one of Megatron-LM's scripts on CPUs, where it asks for a GPU: for trying a command line out, and for tests.

    MEGATRON_LM=FOLDER torchrun --nproc-per-node 2 -m megatron_lowbit.adapters.megatron_script_on_cpu \\
        FOLDER/pretrain_gpt.py --distributed-backend gloo ...

MEGATRON_LM is the folder of Megatron-LM's repository; the script's own megatron.core is used, not an installed one.
Where there is a GPU the script runs as it is.
"""

from __future__ import annotations

import os
import sys
import types
import typing
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import typing_extensions


def main(argv: list[str]) -> None:
    """Run the script argv[0] with the arguments argv[1:]."""
    root = os.environ.get("MEGATRON_LM")
    if not argv or root is None or not (Path(root) / "megatron" / "training").is_dir():
        raise SystemExit("megatron_script_on_cpu: set MEGATRON_LM to Megatron-LM's folder, and name one of its scripts")
    sys.argv = argv
    sys.path[:0] = [str(Path(argv[0]).resolve().parent), root]  # what `python SCRIPT` finds, and what it imports
    with ExitStack() as stack:
        import torch

        if not torch.cuda.is_available():
            stack.enter_context(_no_gpu())
        # Not by runpy: its __main__ would be run again in every process that Megatron spawns, as on a GPU.
        exec(compile(Path(argv[0]).read_bytes(), argv[0], "exec"), {"__name__": "__main__", "__file__": argv[0]})


@contextmanager
def _no_gpu() -> Iterator[None]:
    """Let what the scripts ask of a GPU succeed."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the compiler asks the GPU, too; read when a function is decorated
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron insists, for the sake of its CUDA streams
    if not hasattr(typing, "override"):  # 0.19's scripts are of Python 3.12
        setattr(typing, "override", typing_extensions.override)  # noqa: B010
    import torch

    from megatron_lowbit.adapters.megatron import cpu_shims

    cpu_shims.enable()
    kernels: Any = types.ModuleType("megatron.legacy.fused_kernels")  # of CUDA, compiled when a script starts
    kernels.load = lambda args: None
    sys.modules[kernels.__name__] = kernels
    nothing = lambda *args, **kwargs: None  # noqa: E731
    with cpu_shims.engines():
        cuda: Any = torch.cuda
        answers = {
            "is_available": lambda: True,
            "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            "get_device_properties": lambda *args: types.SimpleNamespace(major=9, minor=0, total_memory=2**33),
            "get_device_capability": lambda *args: (9, 0),
            "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
            "Stream": _Stream,
            "current_stream": _Stream,
            "default_stream": _Stream,
            "stream": nullcontext,
            **{name: getattr(torch, name) for name in ("LongTensor", "IntTensor", "FloatTensor")},
            **dict.fromkeys(("memory_allocated", "memory_reserved"), lambda *args: 0),
            **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), lambda *args: 0),
            **dict.fromkeys(("set_device", "set_stream", "empty_cache", "set_rng_state", "manual_seed"), nothing),
            "reset_peak_memory_stats": nothing,
            "memory_stats": lambda *args: defaultdict(int),
        }
        for name, answer in answers.items():
            setattr(cuda, name, answer)
        cuda.random.get_rng_state = answers["get_rng_state"]  # what recomputing activations asks
        yield


class _Stream:
    """A stream of a device that does all at once."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.cuda_stream = 0

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


if __name__ == "__main__":
    main(sys.argv[1:])
