"""Megatron's parallel groups in a RankPool, whose workers live on: made once per layout, then put back and forth.

destroy_model_parallel forgets its groups but does not close them: gloo keeps about fifty threads and eighty sockets per
initialization, each thread polling a hundred times a second.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

_made: dict[tuple[int, int, int], dict[str, Any]] = {}  # {(tp, pp, ep): what parallel_state held}


@contextlib.contextmanager
def parallel(tp: int, pp: int = 1, ep: int = 1) -> Iterator[None]:
    """Inside, Megatron is initialized for this layout; outside it is as before, so that the pool serves other cases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformer Engine and Apex are not installed
        from megatron.core import parallel_state

        from megatron_lowbit.adapters.megatron import cpu_shims, model  # noqa: F401
    cpu_shims.enable()
    state = vars(parallel_state)
    names = [name for name in state if name.startswith("_") and name[1:].isupper()]
    before = {name: state[name] for name in names}
    if (tp, pp, ep) in _made:
        state.update(_made[tp, pp, ep])
    else:
        parallel_state.destroy_model_parallel()  # a command that ran in this worker leaves its groups
        parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep)
        _made[tp, pp, ep] = {name: state[name] for name in names}
    try:
        yield
    finally:
        state.update(before)
