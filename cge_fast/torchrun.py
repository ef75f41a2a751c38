"""torchrun that leaves the last word to the program, without a traceback of its own, and ends with its status:

python -m cge_fast.torchrun --nproc-per-node 4 -m cge_fast.train --config cge_bot --data.root DIR
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> None:
    """The program."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            raise SystemExit(failure.exitcode) from None
        name = signal.Signals(-failure.exitcode).name
        print(f"cge_fast.torchrun: error: rank {rank} was ended by {name}", file=sys.stderr)
        raise SystemExit(128 - failure.exitcode) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


if __name__ == "__main__":
    main()
