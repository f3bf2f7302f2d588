"""What DeepSpeed's engines must not do with a patched model.

    save_16bit_model      transformers would find none of the linears in the file, and fill in random ones
    compile, "autotp"     the pass finds the layers that communicate by their type, and low-bit ones have another

An engine may be made before the patch or after it, and DeepSpeed be imported after it. So the refusals are in
DeepSpeed's class, from the first patch on, and look at the engine's model when they are called.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from megatron_lowbit.adapters import patching
from megatron_lowbit.config import LowBitError

_MODULE = "deepspeed.runtime.engine"
_GUARDED = "_lowbit_guarded"
COMPILED = (
    "DeepSpeed's compiler pass 'autotp' finds tensor-parallel layers by their type and writes their collectives "
    "itself, so low-bit layers would not communicate; leave it out of compile.passes"
)
_REFUSED = {  # {method of DeepSpeedEngine: what it says}
    "save_16bit_model": "save_16bit_model: the engine's linears are low-bit; call engine.module.save_pretrained, which "
    "writes an artifact, or megatron_lowbit.remove(engine) first",
    "get_autotp_backend": COMPILED,
}


def asks_for_compiled_collectives(engine: Any) -> bool:
    """Tell whether an engine is set to have DeepSpeed's compiler write the collectives of tensor parallelism."""
    return bool(
        hasattr(engine, "compile_autotp")
        and engine.is_deepcompile_enabled()
        and engine.compile_autotp()
        and engine.autotp_size() > 1
    )


def guard_engines() -> None:
    """Have DeepSpeed's engines refuse this of a patched model, from now on or once they are imported."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        _guard(module)
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


class _OnImport(MetaPathFinder):
    """Guards the engine's class as soon as its module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_guard(module: ModuleType) -> None:
                run(module)
                _guard(module)

            spec.loader.exec_module = run_and_guard  # type: ignore[method-assign]
        return spec


def _guard(module: Any) -> None:
    for name, why in _REFUSED.items():
        original = getattr(module.DeepSpeedEngine, name, None)  # an older DeepSpeed has no such pass
        if original is not None and not hasattr(original, _GUARDED):
            setattr(module.DeepSpeedEngine, name, _refusing(original, why))


def _refusing(original: Any, why: str) -> Any:
    @functools.wraps(original)
    def method(engine: Any, *arguments: Any, **options: Any) -> Any:
        if patching.is_patched(engine.module):
            raise LowBitError(why)
        return original(engine, *arguments, **options)

    setattr(method, _GUARDED, True)
    return method
