"""The process of a rank beside rank 0: loads its part of the model, and follows.

    python -m trimserve.executor.rank_main DESCRIPTOR PARENT

What is told comes over the connected socket DESCRIPTOR of the process PARENT, which is rank 0.
"""

import os
import pickle
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Final

from trimserve.executor.rank import Done, Follower, Setup, describe, follow, join
from trimserve.executor.rank_processes import Raised
from trimserve.model.loading import load_model
from trimserve.parent import end_with_parent

__all__ = ["main"]

_NEVER_SECONDS: Final = 86400.0
"""For a collective of a rank that somebody watches: rank 0 ends first, and this process with it."""


def main() -> None:
    """Serve until rank 0 is gone, or something fails here."""
    descriptor, parent = map(int, sys.argv[1:])
    connection = Connection(descriptor)
    end_with_parent(parent)

    def reply(message: object) -> None:
        """Send rank 0 a message."""
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
        follow(Follower(model, group, setup.limits.image_cache_bytes), group, reply)
    except EOFError:
        os._exit(0)
    except BaseException as error:  # noqa: BLE001  # told to rank 0, which ends
        with suppress(OSError):
            reply(Raised(f"{type(error).__name__}: {error}", traceback.format_exc()))
        os._exit(1)  # what waits for this rank in a collective sees its end now


if __name__ == "__main__":
    main()
