"""Who is let into the batch, by bytes: what waits, what never can, what is too late, what is not encoded twice."""

import time
from dataclasses import replace

import pytest

from tests.engine.fake_model import IMAGE, FakeModel, request
from tests.engine.stepping import Clock, Output, alone, finished, make_engine, run, start, text
from trimserve.api.chunks import Finished, Started
from trimserve.api.prompt import ImageFile, TokenPrompt
from trimserve.api.trim import TrimRequest
from trimserve.engine.engine import Engine
from trimserve.engine.memory import prefill_scratch_bytes
from trimserve.engine.sequence import SequenceState
from trimserve.engine.warm_up import warm_up
from trimserve.errors import CheckpointError, DeadlinePassed, InvalidRequest

SCRATCH = prefill_scratch_bytes(FakeModel().info)
PAGE = 16 * 8  # one layer of 16 positions: 2 self- and 3 cross-attention layers have no common divisor


def engine_of(num_pages: int, max_batch: int = 4, model: FakeModel | None = None) -> Engine:
    return make_engine(model or FakeModel(), max_batch=max_batch, kv_cache_bytes=SCRATCH + num_pages * PAGE)


def images(*tiles: int) -> TokenPrompt:
    return TokenPrompt((*(IMAGE,) * len(tiles), 65), tuple(ImageFile(b"%d" % n) for n in tiles))


def test_a_pool_without_a_page_is_refused_naming_what_it_takes() -> None:
    with pytest.raises(CheckpointError, match=f"kv_cache_bytes: must be at least {SCRATCH + PAGE}, .* got {SCRATCH}"):
        make_engine(FakeModel(), max_batch=1, kv_cache_bytes=SCRATCH)


def test_a_pool_that_no_image_fits_into_is_refused_at_the_start_by_its_own_knob() -> None:
    with pytest.raises(CheckpointError, match=r"kv_cache_bytes: must hold an image .* needs up to 640 bytes"):
        warm_up(engine_of(num_pages=4))
    warm_up(engine_of(num_pages=5))


def test_a_request_waits_until_its_first_pages_are_free() -> None:
    # Each needs a page in both self-attention layers.
    engine = engine_of(num_pages=5)
    started = [start(engine, request(name, max_new_tokens=10)) for name in "abc"]
    engine.step()
    assert [sequence.state for sequence, _ in started] == [SequenceState.RUNNING] * 2 + [SequenceState.WAITING]
    assert engine.pool.num_free_pages == 1
    while engine.has_work:
        engine.step()
    assert all(isinstance(output[-1], Finished) for _, output in started)
    assert engine.pool.num_free_pages == 5


def test_nobody_overtakes_a_request_that_waits_for_pages() -> None:
    engine = engine_of(num_pages=7)
    order: list[str] = []

    def begin(name: str, max_new_tokens: int, priority: int = 0) -> None:
        def note(chunk: object) -> None:
            if isinstance(chunk, Started):
                order.append(name)

        wanted = request("p", max_new_tokens=max_new_tokens, priority=priority)
        engine.add(engine.prepare(wanted, note, time.monotonic()))

    begin("first", 20)  # 4 pages
    engine.step()
    begin("large", 20)
    begin("small", 5)  # 2 pages, which are free
    engine.step()
    assert order == ["first"]
    begin("urgent", 5, priority=1)
    engine.step()
    assert order == ["first", "urgent"]
    while engine.has_work:
        engine.step()
    assert order == ["first", "urgent", "large", "small"]


def test_pages_that_trimming_frees_let_the_next_request_in() -> None:
    # Untrimmed, 20 features take 2 pages in 3 layers; the 10 kept ones 1. Text takes 2.
    engine = engine_of(num_pages=13)
    _, first = start(engine, request(images(4), max_new_tokens=10))
    _, second = start(engine, request(images(4), max_new_tokens=10))
    engine.step()
    assert isinstance(first[0], Started)
    assert isinstance(second[0], Started)
    assert engine.pool.num_free_pages == 13 - 2 * (2 + 3)


def test_text_that_can_never_fit_is_refused_naming_bytes_and_what_would_help() -> None:
    engine = engine_of(num_pages=3)
    with pytest.raises(InvalidRequest) as raised:
        start(engine, request("x", max_new_tokens=20))
    assert raised.value.field == "sampling.max_new_tokens"
    expected = f"needs up to {4 * PAGE} bytes of KV, 0 of them for its images, and the server has {3 * PAGE}"
    assert expected in str(raised.value)
    assert "a smaller sampling.max_new_tokens, or a larger kv_cache_bytes" in str(raised.value)
    assert finished(run(engine, request("x", max_new_tokens=5))[0])


def test_images_that_can_never_fit_are_refused_naming_bytes_and_what_would_help() -> None:
    engine = engine_of(num_pages=11)
    with pytest.raises(InvalidRequest) as raised:
        start(engine, request(images(4, 4, 4, 4), max_new_tokens=5))
    assert raised.value.field == "trim.max_kept_fraction"
    assert f"needs up to {(2 + 15) * PAGE} bytes of KV, {15 * PAGE} of them for its images" in str(raised.value)
    assert "a smaller trim.max_kept_fraction" in str(raised.value)


def test_only_images_that_decoding_sees_need_room() -> None:
    apart = TokenPrompt((IMAGE, 65, IMAGE, 66), (ImageFile(b"4"), ImageFile(b"1")))
    assert finished(run(engine_of(num_pages=2 + 3), request(apart, max_new_tokens=5))[0])


def test_a_deadline_that_cannot_be_met_is_refused_before_any_work() -> None:
    clock = Clock()
    model = FakeModel(before_decode=clock.work(0.01))  # a hundred tokens take a second
    engine = make_engine(model, max_batch=1, clock=clock)
    run(engine, request("measure", max_new_tokens=5))
    output: Output = []
    wanted = request("late", max_new_tokens=101, ignore_eos=True)
    engine.add(engine.prepare(wanted, output.append, clock.now, clock.now + 0.5))
    model.batch_sizes.clear()
    engine.step()
    assert isinstance(output[-1], DeadlinePassed)
    assert "cannot be met: 0.500 s are left and 1.000 s are needed at least" in str(output[-1])
    assert not model.batch_sizes
    assert not engine.has_work


def test_an_image_seen_before_is_not_encoded_again() -> None:
    model = FakeModel()
    engine = make_engine(model, max_batch=2, image_cache_bytes=2**20)
    outputs = run(engine, request(images(2, 3)), request(images(3)), request(images(2)))
    assert model.encoded == [b"2", b"3"]
    assert (engine.image_cache.num_hits, engine.image_cache.num_misses) == (2, 2)
    for output, prompt in zip(outputs, (images(2, 3), images(3), images(2)), strict=True):
        assert text(output) == text(alone(FakeModel(), request(prompt)))


def test_an_image_of_which_a_policy_needs_to_know_more_is_encoded_once_more() -> None:
    model = FakeModel()
    engine = make_engine(model, max_batch=1, image_cache_bytes=2**20)
    asked = [TrimRequest(), TrimRequest(policy="cls"), TrimRequest(policy="vispruner"), TrimRequest(policy="divprune")]
    run(engine, *(replace(request(images(2)), trim=trim) for trim in asked))
    assert model.encoded == [b"2", b"2"]
    assert (engine.image_cache.num_hits, engine.image_cache.num_misses) == (2, 2)
