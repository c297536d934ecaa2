"""The process of a rank beside rank 0: loads its part of the model, and follows.

    python -m trimserve.executor.rank_main DESCRIPTOR PARENT

What is told comes over the connected socket DESCRIPTOR of the process PARENT, which is rank 0.
"""

import ctypes
import os
import pickle
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Final

from trimserve.executor.rank import Done, Setup, describe, follow, join
from trimserve.executor.rank_processes import Raised
from trimserve.model.loading import load_model

__all__ = ["main"]

_PR_SET_PDEATHSIG: Final = 1

_NEVER_SECONDS: Final = 86400.0
"""For a collective of a rank that somebody watches: rank 0 ends first, and this process with it."""


def main() -> None:
    """Serve until rank 0 is gone, or something fails here."""
    descriptor, parent = map(int, sys.argv[1:])
    connection = Connection(descriptor)
    _end_with(parent)

    def reply(message: object) -> None:
        connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    try:
        setup = pickle.loads(connection.recv_bytes())
        assert isinstance(setup, Setup)
        found = describe(setup)
        reply(found)
        pickle.loads(connection.recv_bytes())  # rank 0 agrees
        group = join(setup, found.info, _NEVER_SECONDS, [connection])
        model = load_model(setup.config, setup.limits, ranks=group)
        reply(Done())
        follow(model, group, setup.limits.image_cache_bytes, reply)
    except EOFError:
        os._exit(0)
    except BaseException as error:  # noqa: BLE001  # told to rank 0, which ends
        with suppress(OSError):
            reply(Raised(f"{type(error).__name__}: {error}", traceback.format_exc()))
        os._exit(1)  # what waits for this rank in a collective sees its end now


def _end_with(parent: int) -> None:
    """End with the parent, whatever ends it; leave signals to the group to the parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it ended before this was asked for
        os._exit(0)


if __name__ == "__main__":
    main()
