"""torchrun that ends with its worker's exit code (torchrun's own is always 1): a scheduler has to see the 99 of a stage
that saved its state, and the 2 of bad input. It adds no traceback of its own to what the worker has said. Arguments are
torchrun's.
"""

from __future__ import annotations

import logging
import re
import signal
import sys

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, error_handler
from torch.distributed.run import main


def is_news(record: logging.LogRecord) -> bool:
    """Return False for what torchrun logs after a rank has said itself why it ends, and for how it ends the others."""
    known = r"failed \(exitcode: (2|99)\)|Sending process \d+ closing signal|no error file defined for parent"
    return re.match(known, record.getMessage()) is None


def run(argv: list[str]) -> int:
    """Run torchrun; returns the exit code."""
    for module in (api, error_handler):
        logging.getLogger(module.__name__).addFilter(is_news)
    try:
        main(argv)
    except ChildFailedError as error:
        return max(error.get_first_failure()[1].exitcode, 1)  # a signal's is negative
    except api.SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it is the ranks' business; they too ignore it until they are ready
    sys.exit(run(sys.argv[1:]))
