"""What waits for a reader: in order, put together, and in messages of a bounded size."""

from dataclasses import replace

from tests.server.fakes import FINISHED
from trimserve.api.chunks import GenerationChunk, Started, TokenDelta, TokenLogprob
from trimserve.engine.stream import MOST_TOKENS, Stream
from trimserve.errors import DeadlinePassed, TrimserveError


async def taken(*chunks: GenerationChunk | TrimserveError) -> list[GenerationChunk | TrimserveError]:
    """What a reader gets who comes when all of these wait."""
    stream = Stream("r", 0, 0.0)
    for chunk in chunks:
        stream.chunks.put_nowait(chunk)
    return await stream.take()


async def test_tokens_that_waited_are_one_delta_between_what_came_before_and_after() -> None:
    started, end = Started("r", 1, (), 0), DeadlinePassed("too late")
    logprobs = [TokenLogprob(-1.0, ((7, -1.0),)), TokenLogprob(-2.0, ())]
    deltas = [TokenDelta("a", (1,), (logprobs[0],)), TokenDelta("", (2,)), TokenDelta("bc", (3,), (logprobs[1],))]
    together = TokenDelta("abc", (1, 2, 3), tuple(logprobs))
    assert await taken(started, *deltas, end) == [started, together, end]
    assert await taken(*deltas) == [together]
    assert await taken(started, end) == [started, end]


async def test_a_long_answer_that_nobody_read_comes_in_deltas_that_no_client_finds_too_large() -> None:
    most, num_tokens = MOST_TOKENS, 3 * MOST_TOKENS + 1
    deltas = await taken(*(TokenDelta("x", (token_id,)) for token_id in range(num_tokens)))
    sizes = [len(delta.token_ids) for delta in deltas if isinstance(delta, TokenDelta)]
    assert sizes == [most, most, most, 1]
    ids = [token_id for delta in deltas if isinstance(delta, TokenDelta) for token_id in delta.token_ids]
    assert ids == list(range(num_tokens))


async def test_answers_are_put_together_each_for_itself() -> None:
    deltas = [TokenDelta("a", (1,)), TokenDelta("x", (2,), choice=1), TokenDelta("b", (3,))]
    joined = [TokenDelta("ab", (1, 3)), TokenDelta("x", (2,), choice=1)]
    end = replace(FINISHED, choice=1)
    assert await taken(*deltas) == joined
    assert await taken(*deltas, end, TokenDelta("c", (4,))) == [joined[1], end, TokenDelta("abc", (1, 3, 4))]
    assert await taken(*deltas, late := DeadlinePassed("too late")) == [*joined, late]
