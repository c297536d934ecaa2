"""A batch is patient with a full server, and stops at what would befall every line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from tests.server.fakes import CHUNKS, CONFIG, FakeRunner
from trimserve.api.chunks import GenerationChunk
from trimserve.batch.asking import Asker, completed
from trimserve.batch.lines import Line
from trimserve.client import Client
from trimserve.errors import EngineBusy, InvalidRequest, OutOfMemory, RequestFailed, TrimserveError, Unauthenticated
from trimserve.serve import make_server
from trimserve.server.running import InProcessServer

LINE = Line(0, b'{"prompt": "Hello"}')


class Refusing(FakeRunner):
    """Refuses some requests before it answers."""

    def __init__(self, *refusals: TrimserveError) -> None:
        """Remember the refusals, the first first."""
        super().__init__()
        self.refusals = [*refusals]

    @property
    def script(self) -> tuple[GenerationChunk | TrimserveError, ...]:  # played once each
        return (self.refusals.pop(0),) if self.refusals else CHUNKS

    @script.setter
    def script(self, _: object) -> None:
        pass


@contextmanager
def asking(runner: FakeRunner, waits: list[float]) -> Iterator[Asker]:
    with InProcessServer(make_server(runner, CONFIG)) as server, Client(server.address) as client:
        yield Asker(client, Path(), waits.append)


def test_a_full_server_is_asked_again_after_the_time_it_names_for_as_long_as_it_takes() -> None:
    waits: list[float] = []
    with asking(Refusing(*[EngineBusy("full", retry_after_seconds=2.0)] * 20), waits) as asker:
        assert asker.outcome(LINE)["response"]["text"] == "Hello ☃!"
    assert len(waits) == 20
    assert all(2 <= seconds <= 3 for seconds in waits)


def test_a_line_for_which_there_is_no_memory_is_tried_four_times() -> None:
    waits: list[float] = []
    with asking(Refusing(*[OutOfMemory("no memory")] * 20), waits) as asker:
        assert asker.outcome(LINE) == {"error": {"code": "RESOURCE_EXHAUSTED", "message": "no memory"}}
    assert len(waits) == 3


def test_a_stopped_batch_waits_no_more() -> None:
    waits: list[float] = []
    with asking(Refusing(*[EngineBusy("full")] * 20), waits) as asker:
        asker.stop()
        assert asker.outcome(LINE)["error"]["message"] == "full"
    assert not waits


def test_what_is_wrong_with_a_line_is_its_outcome() -> None:
    refusals = (RequestFailed("NaN"), InvalidRequest("trim.k_ratio", "must be in (0, 1], got 2"))
    with asking(Refusing(*refusals), []) as asker:
        assert asker.outcome(LINE) == {"error": {"code": "INTERNAL", "message": "NaN"}}
        assert asker.outcome(LINE)["error"]["message"] == "trim.k_ratio: must be in (0, 1], got 2"


def test_a_refused_image_is_called_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"meow")
    line = Line(0, json.dumps({"prompt": "?", "images": [str(tmp_path / "cat.png")]}).encode())
    refusal = InvalidRequest("chat.messages[0].parts[0].image.data", "must be an image file")
    with asking(Refusing(refusal), []) as asker:
        assert asker.outcome(line)["error"]["message"] == f"{tmp_path}/cat.png: must be an image file"


def test_what_would_befall_every_line_ends_the_batch_with_the_answers_so_far() -> None:
    lines = [Line(index, b'{"prompt": "Hello"}') for index in range(50)]
    answered: list[object] = []
    with asking(Refusing(RequestFailed("one"), Unauthenticated("who?")), []) as asker:
        with pytest.raises(grpc.RpcError) as stopped:
            answered.extend(completed(asker, lines, 1))
        assert stopped.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert len(answered) <= 1


def test_every_line_has_one_outcome_whatever_the_concurrency() -> None:
    lines = [Line(index, b'{"prompt": "Hello"}') for index in range(100)]
    for concurrency in (1, 7, 200):
        with asking(FakeRunner(), []) as asker:
            done = [line.index for line, _ in completed(asker, lines, concurrency)]
        assert sorted(done) == [*range(100)]
