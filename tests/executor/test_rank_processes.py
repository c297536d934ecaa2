"""Processes of ranks: they are told apart by their end, and none outlives who started it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.patience import PATIENCE_SECONDS
from trimserve.config import EngineConfig, ModelConfig
from trimserve.errors import RankFailed
from trimserve.executor.rank_processes import RankProcesses
from trimserve.executor.tensor_parallel import start_ranks

BEGIN = """
import pickle, sys, time
from multiprocessing.connection import Connection
from trimserve.executor.rank_processes import Raised
from trimserve.parent import end_with_parent
connection = Connection(int(sys.argv[1]))
end_with_parent(int(sys.argv[2]))
connection.send_bytes(pickle.dumps("here"))
"""
WAITS = ("-c", BEGIN + "time.sleep(600)")
RAISES = ("-c", BEGIN + "connection.recv_bytes(); connection.send_bytes(pickle.dumps(Raised('OSError: no', 'stack')))")
ENDS = ("-c", BEGIN + "connection.recv_bytes(); sys.exit(3)")

PARENT = f"""
import os, signal, sys
from trimserve.executor.rank_processes import RankProcesses
processes = RankProcesses(2, 60, ("-c", {WAITS[1]!r}))
processes.replies(str)
os.kill(processes.pids[0], signal.SIGSTOP)
print(processes.pids[0], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def failure_of(processes: RankProcesses) -> BaseException:
    failures: SimpleQueue[BaseException] = SimpleQueue()
    processes.watch(failures.put)
    return failures.get(timeout=PATIENCE_SECONDS)


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def await_end(pid: int) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not is_gone(pid):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_rank_that_is_killed_is_told_and_takes_the_others_with_it() -> None:
    processes = RankProcesses(3, 60, WAITS)
    assert processes.replies(str) == ["here", "here"]
    os.kill(processes.pids[1], signal.SIGKILL)
    failure = failure_of(processes)
    assert isinstance(failure, RankFailed)
    assert str(failure) == "rank 2 was ended by SIGKILL"
    assert processes.cause_of(RankFailed("a sum of all ranks failed")) is failure
    with pytest.raises(RankFailed, match="rank 2 was ended by SIGKILL"):
        processes.replies(str)
    await_end(processes.pids[0])
    processes.close()


@pytest.mark.parametrize(
    ("module", "words"), [(RAISES, "rank 1 failed: OSError: no"), (ENDS, "rank 1 ended with status 3")]
)
def test_a_rank_says_why_it_ends(module: tuple[str, str], words: str) -> None:
    processes = RankProcesses(2, 60, module)
    processes.replies(str)
    processes.tell(["end"])
    assert str(failure_of(processes)) == words
    processes.close()


def test_who_waits_for_a_rank_in_compiled_code_is_told_of_its_end() -> None:
    processes = RankProcesses(2, 60, RAISES)
    processes.replies(str)
    is_over = threading.Event()

    def wait() -> None:
        processes.tell(["raise"])
        is_over.wait(PATIENCE_SECONDS)

    with pytest.raises(RankFailed, match="rank 1 failed: OSError: no"):
        processes.unless_one_ends(wait)
    assert not is_over.is_set()
    is_over.set()
    processes.close()


def test_what_does_not_wait_in_vain_gives_its_result_or_its_own_error() -> None:
    processes = RankProcesses(2, 60, WAITS)
    assert processes.unless_one_ends(lambda: 5) == 5
    with pytest.raises(ValueError, match="invalid literal"):
        processes.unless_one_ends(lambda: int("five"))
    processes.close()


def test_a_rank_that_fails_while_ranks_meet_is_named_by_who_starts_them() -> None:
    program = (
        "from trimserve.executor import rank_main\n"
        "def fail(*_): raise OSError('no loopback')\n"
        "rank_main.join = fail\n"
        "rank_main.main()"
    )
    with pytest.raises(RankFailed, match="rank 1 failed: OSError: no loopback"):
        start_ranks(ModelConfig(), EngineConfig(tensor_parallel=2), module=("-c", program))


def test_closing_ends_a_rank_that_is_stopped_and_is_no_failure() -> None:
    processes = RankProcesses(2, 60, WAITS)
    processes.replies(str)
    failures: list[BaseException] = []
    processes.watch(failures.append)
    os.kill(processes.pids[0], signal.SIGSTOP)
    processes.close()
    assert is_gone(processes.pids[0])
    assert not failures
    assert not processes.store.parent.exists()


def test_an_error_of_rank_0_is_not_laid_on_another() -> None:
    processes = RankProcesses(2, 60, WAITS)
    cause = processes.cause_of(ValueError("injected"))
    assert str(cause) == "rank 0 failed: ValueError('injected')"
    processes.close()


def test_a_stopped_rank_does_not_outlive_a_rank_0_that_is_killed() -> None:
    ended = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    await_end(int(ended.stdout))
