"""The engine over several ranks: the tokens of one process, nothing held at the end, and no error that is survived."""

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from pydantic import ByteSize

from tests.engine.stepping import deltas, run
from tests.engine.test_random_mixes import answer, assert_same, choices_of, draw_request
from tests.engine.test_real_model import ONE, REQUESTS
from tests.model.ranks import ThreadRanks
from tests.patience import PATIENCE_SECONDS
from trimserve.api.chunks import Finished, GenerationChunk
from trimserve.api.constraint import Regex
from trimserve.api.request import GenerationRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.engine import Engine
from trimserve.engine.sequence import SequenceState
from trimserve.errors import AdapterError, RankFailed, TrimserveError
from trimserve.executor.drafter import Text
from trimserve.executor.local import LocalExecutor
from trimserve.executor.rank import Description, Follower, follow
from trimserve.executor.tensor_parallel import TensorParallelExecutor, check_agreement
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

Output = list[GenerationChunk | TrimserveError]

LIMITS = EngineConfig(
    max_batch=12,
    kv_cache_bytes=ByteSize(2**23),
    image_cache_bytes=ByteSize(2**15),
    prefill_slice_seconds=0.002,
)
"""Fewer images fit into the cache than there are, and a prefill is cut into slices."""


class ThreadProcesses:
    """What `RankProcesses` is to an executor, where ranks are threads."""

    def __init__(self) -> None:
        """Nothing is said yet."""
        self.said: SimpleQueue[object] = SimpleQueue()

    def replies(self, kind: type) -> list[object]:
        reply = self.said.get(timeout=PATIENCE_SECONDS)
        assert isinstance(reply, kind)
        return [reply]

    def cause_of(self, error: BaseException) -> RankFailed:
        return error if isinstance(error, RankFailed) else RankFailed(repr(error))


class Pair:
    """Rank 0 and a rank that follows it."""

    def __init__(self, ranks: ThreadRanks, models: list[Mllama]) -> None:
        """Let rank 1 follow, and make an engine."""
        processes: Any = ThreadProcesses()
        cache_bytes = LIMITS.image_cache_bytes
        self.executor = TensorParallelExecutor(models[0], ranks.groups[0], processes, cache_bytes)
        self.follower = Follower(models[1], ranks.groups[1], cache_bytes)
        self.locals: list[LocalExecutor] = [self.executor._local, self.follower]

        def take_orders() -> None:
            try:
                follow(self.follower, ranks.groups[1], processes.said.put)
            finally:  # as the end of its process would
                ranks.leave(1)

        self._ranks = ranks
        self.end: Future[None] = ranks.start(1, take_orders)
        self.engine = Engine(models[0].processor, self.executor, LIMITS)

    def close(self) -> None:
        """Let go of the other rank, whatever it does."""
        self._ranks.leave(0)
        with suppress(BaseException):
            self.end.result(PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadRanks]:
    ranks = ThreadRanks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def parts(checkpoint: Path, ranks: ThreadRanks) -> list[Mllama]:
    return ranks.load(ModelConfig(model=str(checkpoint)))


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Mllama:
    """In one process."""
    return load_model(ModelConfig(model=str(checkpoint)), LIMITS)


@pytest.fixture
def pair(ranks: ThreadRanks, parts: list[Mllama]) -> Iterator[Pair]:
    pair = Pair(ranks, parts)
    yield pair
    pair.close()
    ranks.meet_again()


def drawn_requests(num: int) -> list[GenerationRequest]:
    rng = random.Random("ranks")
    wanted = [draw_request(rng, f"r{number}", 6) for number in range(num)]
    constraint = Regex("[a-z ]{4,30}")
    return [replace(each, constraint=constraint) if number % 9 == 0 else each for number, each in enumerate(wanted)]


def test_200_requests_with_cancels_get_the_tokens_of_one_process_and_leave_nothing(pair: Pair, whole: Mllama) -> None:
    requests = drawn_requests(200)
    expected = run(Engine(whole.processor, LocalExecutor(whole, LIMITS.image_cache_bytes), LIMITS), *requests)
    engine, rng = pair.engine, random.Random("cancels")
    outputs: list[Output] = [[] for _ in requests]
    sequences = [
        engine.prepare(wanted, output.append, time.monotonic())
        for wanted, output in zip(requests, outputs, strict=True)
    ]
    cancelled = set(rng.sample(range(200), 50))
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        for number in cancelled:
            if sequences[number].state is SequenceState.RUNNING and rng.random() < 0.3:
                engine.cancel(sequences[number])
        running = [each for each in sequences if each.state is SequenceState.RUNNING]
        if running and rng.random() < 0.1:
            engine.preempt(rng.choice(running))
        engine.step()
    by_rounding = 0
    for number, (wanted, output) in enumerate(zip(requests, outputs, strict=True)):
        has_ended = sum(isinstance(chunk, Finished) for chunk in output) == wanted.num_choices
        assert has_ended or number in cancelled
        for choice, one in enumerate(choices_of(wanted)):
            by_rounding += assert_same(answer(output, choice), answer(expected[number], choice), one)
    assert by_rounding <= 4
    assert engine.num_preemptions > 5
    assert engine.pool.num_free_pages == engine.pool.num_pages
    pair.executor.free_pages()  # every rank waits for what was told before, and knows no sequence any more
    assert pair.executor._last == {}
    ours, theirs = pair.locals
    assert list(ours._images._images) == list(theirs._images._images)
    assert ours._images.num_evictions == theirs._images.num_evictions > 0


class Knowing:
    """Drafts what it was told, with a wrong token in every third place."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        """Of answers that begin differently."""
        self._answers = answers

    def propose(self, texts: Sequence[Text], most: int) -> list[list[int]]:
        return [self._next(list(text.generated_token_ids), most) for text in texts]

    def forget(self, sequence: int) -> None:
        """Nothing is kept."""

    def _next(self, told: list[int], most: int) -> list[int]:
        [answer] = (each for each in self._answers if list(each[: len(told)]) == told)
        return [token + (place % 3 == 2) for place, token in enumerate(answer)][len(told) : len(told) + most]


def test_drafts_are_rows_on_every_rank(pair: Pair, whole: Mllama) -> None:
    requests = [REQUESTS[index] for index in (0, 2, 5)]
    expected = run(Engine(whole.processor, LocalExecutor(whole), LIMITS), *requests)
    answers = [[token for delta in deltas(output) for token in delta.token_ids] for output in expected]
    engine = Engine(whole.processor, pair.executor, LIMITS, drafter=Knowing(answers))
    outputs = run(engine, *requests)
    assert [[token for delta in deltas(output) for token in delta.token_ids] for output in outputs] == answers
    assert 0 < engine.speculation.num_accepted < engine.speculation.num_proposed


def test_an_error_between_two_sums_on_either_rank_is_fatal_20_of_20(
    ranks: ThreadRanks, parts: list[Mllama], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [GenerationRequest(f"r{n}", ONE, each.sampling, each.trim) for n, each in enumerate(drawn_requests(4))]
    for attempt in range(20):
        rng = random.Random(f"faults/{attempt}")
        pair = Pair(ranks, parts)
        layer = rng.choice(parts[attempt % 2]._decoder._layers)
        good_calls = iter(range(rng.randint(0, 3)))
        mlp = layer._with_rows_mlp

        def broken(*arguments: Any, good_calls: Iterator[int] = good_calls, mlp: Any = mlp) -> Any:
            if next(good_calls, None) is None:
                raise ValueError("injected")
            return mlp(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(layer, "_with_rows_mlp", broken)
            with pytest.raises(RankFailed):
                run(pair.engine, *wanted)
            pair.close()
        if attempt % 2:
            with pytest.raises(ValueError, match="injected"):
                pair.end.result()
        ranks.meet_again()


def test_adapters_are_refused_while_it_runs(pair: Pair, checkpoint: Path) -> None:
    with pytest.raises(AdapterError, match="adapters do not work with tensor_parallel"):
        pair.engine.load_adapter("one", checkpoint)


def test_ranks_that_found_different_checkpoints_do_not_begin(parts: list[Mllama]) -> None:
    own = Description(parts[0].info, "2.13")
    check_agreement(own, [own, own])
    with pytest.raises(RankFailed, match=r"ranks disagree: revision is '.*' on rank 0, 'other' on rank 2"):
        check_agreement(own, [own, own._replace(info=replace(own.info, revision="other"))])
    with pytest.raises(RankFailed, match="ranks disagree: torch is"):
        check_agreement(own, [own._replace(torch="2.12")])
