"""Commands inside the ranks of a RankPool, as a launcher would have started them: imports take longer than they do."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile

from torch import distributed as dist


def command(rank: int, size: int, port: int, *argv: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `megatron-lowbit ARGV` on this rank. For a pool of its own: the
    command joins and leaves the process group itself."""
    from megatron_lowbit.launch import main

    if dist.is_initialized():
        dist.destroy_process_group()
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None:
        deepspeed.comm.comm.cdb = deepspeed.InferenceEngine.inference_mp_group = None
    os.environ["MASTER_PORT"] = str(port)
    # Files, since some of what is imported asks for a file descriptor.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(argv))
        for stream in (out, err):
            stream.seek(0)
        return code, out.read(), err.read()
