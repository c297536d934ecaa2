"""What the page shows of an answer, from the messages of a server."""

from PIL import Image

from tests.server.fakes import CHUNKS, CONFIG, DELTAS, FINISHED, INFO, FakeRunner
from trimserve.client import Client, make_request
from trimserve.errors import EngineBusy
from trimserve.playground.asking import Seen, ask
from trimserve.playground.samples import samples
from trimserve.serve import make_server
from trimserve.server.running import InProcessServer

IMAGE = Image.new("RGB", (50, 28), "white")


def seen(runner: FakeRunner, image: Image.Image | None = IMAGE) -> list[Seen]:
    """All that a person sees."""
    with InProcessServer(make_server(runner, CONFIG)) as server, Client(server.address) as client:
        return [*ask(client, make_request("?"), image, INFO.tile_size)]


def test_light_and_votes_come_first_then_words_then_the_account() -> None:
    first, *words, last = seen(FakeRunner(CHUNKS))
    assert first.kept is not None
    assert first.votes is not None
    assert first.kept.size == first.votes.size
    assert "| kept_fraction | 0.500 |" in str(first.account)
    texts = [each.text for each in words]
    assert texts == ["".join(delta.text for delta in DELTAS[: count + 1]) for count in range(len(texts))]
    assert last.text == texts[-1]
    assert last.account is not None
    for told in ("4 + 1 merged of 10", f"{FINISHED.cross_kv.untrimmed:,}", "2,048 (75.0% less)", "5.0 ms, 3 tokens"):
        assert told in last.account


def test_a_question_without_an_image_has_no_pictures() -> None:
    assert not any(each.kept or each.votes for each in seen(FakeRunner(CHUNKS), None))


def test_a_refusal_is_shown_in_place_of_the_answer() -> None:
    (only,) = seen(FakeRunner([EngineBusy("the queue is full", 1.0)]))
    assert only.is_refused
    assert only.text == "RESOURCE_EXHAUSTED: the queue is full"


def test_each_sample_is_an_image_with_a_question() -> None:
    assert len(samples()) >= 5
    for path, question in samples():
        assert question.endswith(("?", "."))
        Image.open(path).verify()
