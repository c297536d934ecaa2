"""The soak's own judgement: what it calls a leak, a broken stream, and a fair mix of requests; who looks on."""

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from scripts.verify.load.asks import Asks, Fate, Shares
from scripts.verify.load.clients import fault_of_stream
from scripts.verify.load.memory import Sample, growth
from scripts.verify.load.onlookers import asked
from tests.server.fakes import CONFIG, FakeRunner
from trimserve.serve import make_server
from trimserve.server.running import running_server
from trimserve.v1 import generation_pb2 as pb

MIB = 2**20


def samples(rss_mib: Callable[[float], float]) -> list[Sample]:
    """Ten minutes, a sample each second."""
    return [Sample(float(second), int(rss_mib(second / 600) * MIB)) for second in range(601)]


def test_memory_that_grows_while_it_warms_up_and_then_breathes_is_flat() -> None:
    found = growth(samples(lambda share: min(500, 400 + 1000 * share) + (40 if int(share * 600) % 7 == 0 else 0)))
    assert found.fraction == 0


def test_a_leak_shows_as_what_it_adds_from_the_second_fifth_to_the_last() -> None:
    found = growth(samples(lambda share: 500 + 100 * share))
    assert (found.early_bytes / MIB, found.late_bytes / MIB) == pytest.approx((530, 590), abs=0.2)
    assert found.fraction == pytest.approx(60 / 530, abs=1e-3)


STARTED = pb.GenerateStreamResponse(started=pb.Started())
TWO = pb.GenerateStreamResponse(delta=pb.TokenDelta(token_ids=[1, 2]))
FINISHED = pb.GenerateStreamResponse(finished=pb.Finished(usage=pb.Usage(num_generated_tokens=4)))


def test_a_stream_with_start_tokens_and_end_is_whole() -> None:
    assert fault_of_stream([STARTED, TWO, TWO, FINISHED], 4) is None


@pytest.mark.parametrize(
    "events",
    [[], [TWO, TWO, FINISHED], [STARTED, TWO, TWO], [STARTED, TWO, FINISHED, TWO], [STARTED, TWO, FINISHED]],
    ids=["nothing", "no start", "no end", "end too early", "tokens missing"],
)
def test_a_stream_that_lacks_something_is_told(events: Sequence[pb.GenerateStreamResponse]) -> None:
    assert fault_of_stream(events, 4)


def test_requests_are_drawn_in_the_shares_that_are_asked_for_and_of_every_kind() -> None:
    asks = Asks(tile_size=16, shares=Shares(cancelled=0.1, refused=0.05), seed=0)
    drawn = [asks.draw() for _ in range(2000)]
    fates = Counter(ask.fate for ask in drawn)
    assert fates[Fate.CANCELLED] == pytest.approx(200, abs=40)
    assert fates[Fate.REFUSED] == pytest.approx(100, abs=30)
    assert len({ask.kind for ask in drawn if ask.fate is Fate.ANSWERED}) == 3 * 2 * 2


def test_all_requests_may_be_streams() -> None:
    asks = Asks(tile_size=16, shares=Shares(cancelled=0, refused=0, streamed=1), seed=0)
    assert all(ask.is_streamed and ask.fate is Fate.ANSWERED for ask in (asks.draw() for _ in range(100)))


async def test_onlookers_tell_how_long_each_answer_took() -> None:
    async with running_server(make_server(FakeRunner(), CONFIG)) as server:
        assert server.metrics_address is not None
        async with asked(server.address, server.metrics_address) as seconds:
            pass
    assert set(seconds) == {"health", "metrics", "reflection"}
    assert all(each > 0 for answers in seconds.values() for each in answers)
    assert all(seconds.values())  # at least once
