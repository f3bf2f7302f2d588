"""Runs the example in a public name's docstring, in a folder with "model" and "artifact", on one rank or on each."""

from __future__ import annotations

import contextlib
import doctest
import io
from pathlib import Path

import megatron_lowbit as lowbit


class _Checker(doctest.OutputChecker):
    """Lets DeepSpeed print what it shards."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return super().check_output(want, got, optionflags) or (not want and got.startswith("AutoTP:"))


def run_example(rank: int, size: int, name: str, folder: Path) -> str:
    """What goes wrong in the example of `megatron_lowbit.<name>`; empty where it does what it says."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        if name == "apply_to_deepspeed":
            from megatron_lowbit.adapters import deepspeed

            deepspeed.import_deepspeed().init_distributed(dist_backend="gloo", verbose=False)
        if name == "apply_to_megatron":
            from megatron_groups import parallel

            stack.enter_context(parallel(size))
        text = getattr(lowbit, name).__doc__
        test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
        assert test.examples, f"{name} has no example"
        said = io.StringIO()
        doctest.DocTestRunner(_Checker()).run(test, out=said.write)
        return said.getvalue()
