"""The ways in which ranks add up their partial sums: one file, one class each, found by the name it registers.

    stock.py      bf16, native   a stock all-reduce of the values, as bf16 or as they are
    one_shot.py   one_shot       all-gather of low-bit messages, each rank adds them up
    two_shot.py   two_shot       all-to-all of them, the sums are rounded again and all-gathered
    exact_sum.py  exact_sum      a stock all-reduce of integers that cannot overflow

All files of this folder are imported, so a new file is a new collective (docs/extending.md).
"""

from importlib import import_module
from pkgutil import iter_modules

from megatron_lowbit.comm.collectives.base import COLLECTIVES, Collective, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["COLLECTIVES", "Collective", "register"]
