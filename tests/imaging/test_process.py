"""A process that decodes image files: what it gives back, what ends it, and what it knows of its parent."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.imaging.files import empty_scans, huge_tile, tiny_chunks
from tests.imaging.kinds import encode, kinds
from tests.patience import PATIENCE_SECONDS
from trimserve.errors import InvalidRequest
from trimserve.imaging.decode import decode_pixels
from trimserve.imaging.limits import Limits
from trimserve.imaging.process import DecoderProcess, ProcessEnded

LIMITS = Limits(max_pixels=1_000_000)
SHORT = replace(LIMITS, cpu_seconds=0.1, cpu_seconds_per_megapixel=0.1, wall_ratio=400)
KINDS = kinds()
FIELD = "images[0]"


@pytest.fixture(scope="module")
def process() -> Iterator[DecoderProcess]:
    running = DecoderProcess(LIMITS)
    yield running
    running.close()


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_is_the_same_through_a_process(process: DecoderProcess, name: str) -> None:
    pixels = process.decode(KINDS[name], FIELD)
    assert np.array_equal(pixels, decode_pixels(KINDS[name], FIELD, LIMITS.max_pixels))


@pytest.mark.parametrize("data", [b"", b"no image", KINDS["PNG rgb"][:-40], encode(Image.new("L", (1001, 1000)))])
def test_what_decoding_refuses_is_refused_in_the_same_words(process: DecoderProcess, data: bytes) -> None:
    with pytest.raises(InvalidRequest) as expected:
        decode_pixels(data, FIELD, LIMITS.max_pixels)
    with pytest.raises(InvalidRequest) as caught:
        process.decode(data, FIELD)
    assert (caught.value.field, caught.value.message) == (FIELD, expected.value.message)


@pytest.mark.parametrize("data", [huge_tile(20_000), empty_scans(0, side=4096)], ids=["tile", "header"])
def test_a_decoder_gets_no_more_memory_than_the_pixels_of_its_header_warrant(
    process: DecoderProcess, data: bytes
) -> None:
    with pytest.raises(InvalidRequest, match=r"readable TIFF image, .* decoder error|at most 1000000 pixels"):
        process.decode(data, FIELD)
    assert _peak_bytes(process.pid) < 350 * 2**20  # of the tile alone: 400 MB
    assert process.decode(KINDS["PNG rgb"], FIELD).shape == (43, 61, 3)


def test_a_process_keeps_the_memory_of_a_photograph_and_lets_go_that_of_a_large_image() -> None:
    running = DecoderProcess(Limits(max_pixels=10_000_000))
    small, large = KINDS["PNG rgb"], encode(Image.new("RGB", (3000, 2000), (1, 2, 3)))
    assert running.decode(large, FIELD).tolist()[1999][2999] == [1, 2, 3]
    after_large = _memory_files(running.pid)
    pixels = [running.decode(small, FIELD) for _ in range(2)]
    assert (after_large, _memory_files(running.pid)) == ([0], [pixels[0].size])
    running.close()


def test_memory_of_the_largest_image_is_given_back_to_the_limit() -> None:
    running = DecoderProcess(replace(LIMITS, memory_bytes=8 * 2**20))
    largest = encode(Image.new("RGBA", (1000, 1000), (1, 2, 3, 4)))
    for _ in range(5):
        assert running.decode(largest, FIELD).shape == (1000, 1000, 3)
    running.close()


@pytest.mark.parametrize("data", [empty_scans(200_000), tiny_chunks(400_000)], ids=["scans", "chunks"])
def test_a_file_that_takes_too_long_ends_the_process(data: bytes) -> None:
    running = DecoderProcess(SHORT)
    with pytest.raises(ProcessEnded) as caught:
        running.decode(data, FIELD)
    assert caught.value.cause == "processor_time"
    assert running._process.returncode == -signal.SIGPROF
    with pytest.raises(ProcessEnded):
        running.decode(KINDS["PNG rgb"], FIELD)


def test_time_counts_for_each_file_anew() -> None:
    running = DecoderProcess(SHORT)
    data = empty_scans(5000)
    before = _cpu_seconds(running.pid)
    while _cpu_seconds(running.pid) - before < 2 * SHORT.cpu(0):
        running.decode(data, FIELD)
    running.close()


def test_a_process_that_does_not_answer_is_ended_when_its_time_on_the_clock_is_over() -> None:
    running = DecoderProcess(replace(SHORT, wall_ratio=0.1))
    os.kill(running.pid, signal.SIGSTOP)
    with pytest.raises(ProcessEnded) as caught:
        running.decode(KINDS["PNG rgb"], FIELD)
    assert caught.value.cause == "wall_clock"
    assert running._process.returncode == -signal.SIGKILL


def test_a_process_that_is_killed_has_crashed() -> None:
    running = DecoderProcess(LIMITS)
    running.kill()
    with pytest.raises(ProcessEnded) as caught:
        running.decode(KINDS["PNG rgb"], FIELD)
    assert caught.value.cause == "crash"


LIES = {
    "no shape": "send(connection, {})",
    "no pixels": 'send(connection, {"shape": [1, 1, 3]})',
    "another size": 'send(connection, {"shape": [9, 9, 3]}, filled())',
    "a size below zero": 'send(connection, {"shape": [-1, -1, 3]}, filled())',
    "too many pixels": 'send(connection, {"shape": [10**6, 10**6, 3]}, filled())',
    "memory that may shrink": 'send(connection, {"shape": [1, 1, 3]}, os.open(__file__, os.O_RDONLY))',
    "no message": 'connection.send(b"none")',
    "no number": "connection.send(b'{\"shape\": [Infinity, 1, 3]}')",
    "no object": 'connection.send(b"[]")',
}


@pytest.mark.parametrize("lie", LIES)
def test_a_process_that_a_file_has_taken_over_cannot_hurt_its_parent(lie: str, tmp_path: Path) -> None:
    program = f"""
import os, socket, sys
from trimserve.imaging.memory import new_memory, write_memory
from trimserve.imaging.messages import receive, send
def filled():
    memory = new_memory()
    write_memory(memory, [b"123"])
    return memory
connection = socket.socket(fileno=int(sys.argv[1]))
send(connection, {{"is_ready": True}})
receive(connection)
{LIES[lie]}
receive(connection)
"""
    script = tmp_path / "liar.py"
    script.write_text(program)
    running = DecoderProcess(LIMITS, [str(script)])
    with pytest.raises(ProcessEnded):
        running.decode(KINDS["PNG rgb"], FIELD)
    assert running._process.returncode is not None


def test_a_process_that_cannot_start_is_an_error_of_ours() -> None:
    with pytest.raises(OSError, match="a process that decodes images did not start"):
        DecoderProcess(LIMITS, ["-c", "raise SystemExit(1)"])


def test_signals_to_the_group_are_for_the_parent(process: DecoderProcess) -> None:
    assert os.getpgid(process.pid) != os.getpgid(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    assert process.decode(KINDS["PNG rgb"], FIELD).shape == (43, 61, 3)


def test_a_process_knows_nothing_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMSERVE_TOKEN", "secret")
    with open(os.devnull) as inherited:
        os.set_inheritable(inherited.fileno(), True)
        other = DecoderProcess(LIMITS)
    folder = Path(f"/proc/{other.pid}")
    names = {entry.partition(b"=")[0].decode() for entry in (folder / "environ").read_bytes().split(b"\0") if entry}
    allowed = {"PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    assert names <= allowed | {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LC_CTYPE"}
    targets = [os.readlink(link) for link in (folder / "fd").iterdir()]
    assert sum(target.startswith("socket:") for target in targets) == 1
    assert all(target == os.devnull or target.startswith(("socket:", "/memfd:")) for target in targets)
    assert "torch" not in (folder / "maps").read_text()
    other.close()


def test_no_process_outlives_its_parent() -> None:
    program = """
import os, signal
from trimserve.imaging.limits import Limits
from trimserve.imaging.process import DecoderProcess
pid = DecoderProcess(Limits(1_000_000)).pid
os.kill(pid, signal.SIGSTOP)  # as in the middle of a file: it does not look at its connection
print(pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.wait()
    descriptor = _pidfd(pid)
    if descriptor is not None:  # it ends about now
        with open(descriptor, "rb"):
            assert _ends(descriptor)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _ends(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * PATIENCE_SECONDS))


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_bytes(pid: int) -> int:
    """Most memory that a process has used."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _memory_files(pid: int) -> list[int]:
    """Bytes of each memory file that a process has open."""
    files = [file for file in Path(f"/proc/{pid}/fd").iterdir() if "memfd" in os.readlink(file)]
    return [file.stat().st_size for file in files]
