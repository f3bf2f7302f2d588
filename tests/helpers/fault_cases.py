"""Ranks of which one is at fault, as processes of their own: a broken group cannot serve a second test.

python fault_cases.py CASE MODE RANK SIZE FOLDER      rank 1 is the culprit; prints one JSON line, ends with _exit
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.comm.build_plan import synthetic_plan
from megatron_lowbit.comm.reducers import HybridReducer
from megatron_lowbit.config import CommConfig, LowBitError

TIMEOUT = 4  # seconds that gloo waits
TOKENS, FEATURES = 33, 66
CULPRIT = 1


def partial_sums(size: int, tokens: int) -> Tensor:
    """float32 [size, tokens, FEATURES]."""
    return torch.randn(size, tokens, FEATURES, generator=torch.Generator().manual_seed(tokens))


def main(case: str, mode: str, group: dist.ProcessGroup, rank: int, size: int) -> dict[str, object]:
    """What came of one collective: its sum or its error."""
    faulty = rank == CULPRIT
    calibration = partial_sums(size, 300)
    if case == "plan" and faulty:
        calibration = calibration * 1.25
    if case == "bits" and faulty:
        plan = synthetic_plan(calibration, CommConfig(bits=6, carrier_bits=16))
    else:
        plan = synthetic_plan(calibration, CommConfig())
    if case == "mode" and faulty:
        mode = {"one_shot": "two_shot", "two_shot": "exact_sum", "exact_sum": "bf16", "bf16": "one_shot"}[mode]
    reducer = HybridReducer(plan, group, mode)  # type: ignore[arg-type]
    reducer.set_site("model.layers.0.mlp.down_proj")
    tokens = TOKENS
    if case in ("killed", "later", "new"):  # after calls that went well
        for _ in range(2):
            reducer.all_reduce(partial_sums(size, TOKENS)[rank])
    if case == "new":  # all ranks come with another number of tokens, no two with the same
        tokens = 8 + rank
    if case in ("more", "later") and faulty:
        tokens = 2 * TOKENS
    if case == "fewer" and faulty:
        tokens = 1
    if case == "killed":
        tokens = 16001 if mode == "one_shot" else TOKENS  # of which the first travel in rounds (exchange.py)
        dist.barrier(group)
        if faulty:  # inside the collective: all ranks have begun it, and rank 1 is gone before it has sent anything
            sends = {"one_shot": (dist.ProcessGroup, "send"), "two_shot": (dist, "all_to_all_single")}
            setattr(*sends.get(mode, (dist, "all_reduce")), lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    try:
        y = reducer.all_reduce(partial_sums(size, tokens)[rank])
        return {"sum": y.sum().item()}
    except LowBitError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    case, modes, folder, (rank, size) = sys.argv[1], sys.argv[2].split(","), sys.argv[3], map(int, sys.argv[4:])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    limit = datetime.timedelta(seconds=TIMEOUT)
    groups = {mode: dist.new_group(timeout=limit) for mode in modes}  # a broken group leaves the others as they are
    print(json.dumps({mode: main(case, mode, group, rank, size) for mode, group in groups.items()}), flush=True)
    sys.stdin.read()  # the others must not take an end for the fault
    os._exit(0)
