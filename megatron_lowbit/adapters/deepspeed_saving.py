"""DeepSpeed's save_16bit_model writes no patched model: transformers would find none of its linears in the file, and
fill in random ones.

An engine may be made before the patch or after it, and DeepSpeed be imported after it. So the refusal is in DeepSpeed's
class, from the first patch on, and looks at the engine's model when it is called.
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


def refuse_16bit_models() -> None:
    """Have DeepSpeed's engines refuse save_16bit_model of a patched model, from now on or once they are imported."""
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
    original = module.DeepSpeedEngine.save_16bit_model
    if hasattr(original, _GUARDED):
        return

    @functools.wraps(original)
    def save_16bit_model(engine: Any, *arguments: Any, **options: Any) -> Any:
        if patching.is_patched(engine.module):
            raise LowBitError(
                "save_16bit_model: the engine's linears are low-bit; call engine.module.save_pretrained, which writes "
                "an artifact, or megatron_lowbit.remove(engine) first"
            )
        return original(engine, *arguments, **options)

    setattr(save_16bit_model, _GUARDED, True)
    module.DeepSpeedEngine.save_16bit_model = save_16bit_model
