"""How a process that serves another one ends with it, whatever ends it, and leaves signals to it."""

import ctypes
import os
import signal
import sys

__all__ = ["end_with_parent"]

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """End with the thread that started this process, even while stopped; signals to the group are for the parent.

    Args:
        parent: id of the process that started this one.
    Raises:
        SystemExit: it has ended already.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it ended before this was asked for
        sys.exit()
