"""torchrun that ends with its worker's exit code (torchrun's own is always 1): a scheduler has to see the 99 of a stage
that saved its state, and the 2 of bad input. Arguments are torchrun's.
"""

from __future__ import annotations

import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it is the ranks' business; they too ignore it until they are ready
    try:
        main(sys.argv[1:])
    except ChildFailedError as error:
        sys.exit(max(error.get_first_failure()[1].exitcode, 1))  # a signal's is negative
