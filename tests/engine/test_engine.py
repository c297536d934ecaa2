"""The engine step by step, driven by a fake model: endings, batches, cancellation, failures, bytes, times."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.fake_model import (
    BREAKS_DECODE,
    BREAKS_PREFILL,
    END,
    IMAGE,
    LOGITS_ARE_NAN,
    FakeModel,
    request,
)
from tests.engine.stepping import Clock, Output, alone, deltas, finished, make_engine, run, start, text
from trimserve.api.chunks import Finished, FinishReason, GenerationChunk, Started
from trimserve.api.prompt import ImageFile, Prompt, RawPrompt, TokenPrompt
from trimserve.api.request import GenerationRequest
from trimserve.engine.sequence import Sequence, SequenceState
from trimserve.errors import EngineBusy, InvalidRequest, RequestFailed, TrimserveError


def test_the_first_chunk_is_started_the_last_is_finished_and_between_come_tokens() -> None:
    output = alone(FakeModel({"hi": "yes"}), request("hi", name="mine", seed=5))
    assert output[0] == Started(request_id="mine", num_prompt_tokens=2, images=(), seed=5)
    assert [(delta.text, delta.token_ids) for delta in deltas(output)] == [
        ("y", (ord("y"),)),
        ("e", (ord("e"),)),
        ("s", (ord("s"),)),
        ("", (END,)),
    ]
    last = finished(output)
    assert (last.reason, last.matched_stop) == (FinishReason.STOP, END)
    assert (last.num_prompt_tokens, last.num_generated_tokens) == (2, 4)


ENDINGS = [  # sampling, text, tokens, reason, matched
    ({}, "one two", 8, FinishReason.STOP, END),
    ({"max_new_tokens": 3}, "one", 3, FinishReason.LENGTH, None),
    ({"max_new_tokens": 7}, "one two", 7, FinishReason.LENGTH, None),
    ({"max_new_tokens": 8}, "one two", 8, FinishReason.STOP, END),  # the end comes with the last token
    ({"stop_token_ids": (ord("t"),)}, "one ", 5, FinishReason.STOP, ord("t")),
    ({"stop_strings": ("e tw",)}, "on", 6, FinishReason.STOP, "e tw"),
    ({"stop_strings": ("two",), "max_new_tokens": 7}, "one ", 7, FinishReason.STOP, "two"),
    ({"stop_strings": ("two!",)}, "one two", 8, FinishReason.STOP, END),  # held back, given at the end
    ({"stop_strings": ("o",), "min_new_tokens": 2}, "one tw", 7, FinishReason.STOP, "o"),
    (
        {"stop_token_ids": (ord("o"),), "min_new_tokens": 3, "max_new_tokens": 3},
        None,
        3,
        FinishReason.LENGTH,
        None,
    ),
]


@pytest.mark.parametrize(("sampling", "expected", "num_tokens", "reason", "matched"), ENDINGS)
def test_endings(
    sampling: dict[str, Any], expected: str | None, num_tokens: int, reason: FinishReason, matched: object
) -> None:
    output = alone(FakeModel({"count": "one two"}), request("count", **sampling))
    last = finished(output)
    assert (last.num_generated_tokens, last.reason, last.matched_stop) == (num_tokens, reason, matched)
    if expected is not None:
        assert text(output) == expected


def test_ignore_eos_goes_on_and_the_end_token_has_no_text() -> None:
    model = FakeModel({"go": (ord("a"), END, ord("b"))})
    output = alone(model, request("go", ignore_eos=True, max_new_tokens=3))
    assert [delta.token_ids for delta in deltas(output)] == [(ord("a"),), (END,), (ord("b"),)]
    assert (text(output), finished(output).reason) == ("ab", FinishReason.LENGTH)


def test_a_cut_code_point_is_flushed_at_the_end() -> None:
    output = alone(FakeModel({"go": "😀"}), request("go", max_new_tokens=3))
    assert [delta.text for delta in deltas(output)] == ["", "", "\ufffd"]


def test_unset_max_new_tokens_is_the_default_or_the_room_left() -> None:
    for max_model_len, expected in [(128, 20), (15, 5)]:
        output = alone(FakeModel(max_model_len=max_model_len), request("0123456789"))
        assert finished(output).num_generated_tokens == expected


def test_the_whole_context_can_be_used_and_not_one_token_more() -> None:
    model = FakeModel(max_model_len=15)
    output = alone(model, request("0123456789", max_new_tokens=5))
    assert finished(output).num_generated_tokens == 5
    with pytest.raises(InvalidRequest, match="room for 5, got 6") as raised:
        alone(model, request("0123456789", max_new_tokens=6))
    assert raised.value.field == "sampling.max_new_tokens"
    with pytest.raises(InvalidRequest, match="15 tokens in a context of 15 leaves no room"):
        alone(model, request("0123456789abcde"))


def test_more_new_tokens_than_can_come_are_refused() -> None:
    model = FakeModel(max_model_len=15)
    wanted = [
        (request("0123456789", min_new_tokens=6), "must be at most 5, .* a prompt of 10 tokens .* of 15, got 6"),
        (request("0123456789", min_new_tokens=3, max_new_tokens=2), "must be at most 2, .* got 3"),
    ]
    for one, message in wanted:
        with pytest.raises(InvalidRequest, match=message) as raised:
            alone(model, one)
        assert raised.value.field == "sampling.min_new_tokens"
    assert finished(alone(model, request("0123456789", min_new_tokens=5))).num_generated_tokens == 5


def test_room_is_checked_before_an_image_is_decoded() -> None:
    model = FakeModel()
    with pytest.raises(InvalidRequest, match="room for 126, got 127"):
        alone(model, request(TokenPrompt((IMAGE, 65), (ImageFile(b"1"),)), max_new_tokens=127))
    assert not model.images


MIXED: list[GenerationRequest] = [
    request("greedy"),
    request("sampled", temperature=1.0, seed=3, num_top_logprobs=2),
    request(
        TokenPrompt((IMAGE, 65, IMAGE, 66), (ImageFile(b"1"), ImageFile(b"3"))), temperature=0.7, seed=4, top_p=0.9
    ),
    request("short", max_new_tokens=2),
    request("penalized", repetition_penalty=1.3, presence_penalty=0.5, temperature=0.5, seed=9),
    request("long", max_new_tokens=40, temperature=2.0, seed=2**64 - 1),
]


@pytest.mark.parametrize("max_batch", [1, 2, 4])
def test_a_batch_gives_what_each_alone_gives(max_batch: int) -> None:
    model = FakeModel()
    together = run(make_engine(model, max_batch=max_batch), *MIXED)
    assert max(model.batch_sizes) == max_batch
    for wanted, output in zip(MIXED, together, strict=True):
        expected = alone(FakeModel(), wanted)
        assert output[:-1] == expected[:-1]
        assert finished(output).reason == finished(expected).reason
        assert finished(output).cross_kv == finished(expected).cross_kv


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    first, again, other = (text(alone(FakeModel(), request("dice", temperature=1.5, seed=seed))) for seed in (1, 1, 2))
    assert first == again != other


def test_requests_join_and_leave_between_steps() -> None:
    model = FakeModel({"a": "aaaa", "b": "bbbbbb"})
    engine = make_engine(model, max_batch=4)
    _, first = start(engine, request("a"))
    engine.step()
    _, second = start(engine, request("b"))
    while engine.has_work:
        engine.step()
    # Prefill gives the first token, so "aaaa" and the end token take 4 decodes, "bbbbbb" 6.
    assert model.batch_sizes == [1, 2, 2, 2, 1, 1, 1]
    assert (text(first), text(second)) == ("aaaa", "bbbbbb")


def test_the_batch_never_has_more_than_its_places() -> None:
    model = FakeModel()
    engine = make_engine(model, max_batch=3)
    for number in range(5):
        start(engine, request(f"p{number}", max_new_tokens=10))
    for _ in range(5):
        engine.step()
    assert model.batch_sizes == [3] * 5


def test_running_requests_wait_for_one_layer_of_the_next_when_the_slice_is_zero() -> None:
    log: list[str] = []
    model = FakeModel(before_layer=lambda: log.append("layer"), before_decode=lambda: log.append("decode"))
    engine = make_engine(model, max_batch=2, prefill_slice_seconds=0)
    start(engine, request("a", max_new_tokens=20))
    while "decode" not in log:
        engine.step()
    log.clear()
    start(engine, request(TokenPrompt((IMAGE, IMAGE, 65), (ImageFile(b"1"), ImageFile(b"2")))))
    for _ in range(6):
        engine.step()
    # Two layers that begin, one in each image; then the prefill's.
    assert log == ["decode", "layer", "decode", "layer", "decode", "layer", "decode", "decode", "decode"]


def test_a_slice_is_as_long_as_it_may_be() -> None:
    log: list[str] = []
    clock = Clock()

    def layer() -> None:
        log.append("layer")
        clock.now += 0.02  # two of them are more than a slice, one is less

    model = FakeModel(before_layer=layer, before_decode=lambda: log.append("decode"))
    engine = make_engine(model, max_batch=2, prefill_slice_seconds=0.03, clock=clock)
    start(engine, request("a", max_new_tokens=20))
    while "decode" not in log:
        engine.step()
    log.clear()
    start(engine, request(TokenPrompt((IMAGE,) * 4 + (65,), tuple(ImageFile(b"%d" % n) for n in range(1, 5)))))
    while log.count("layer") < 5:
        engine.step()
    most_between = max(len(run) for run in " ".join(log).replace("layer", "x").replace(" ", "").split("decode"))
    assert most_between == 2


def test_larger_priority_first_and_first_come_first_served_among_equals() -> None:
    engine = make_engine(FakeModel(), max_batch=1)
    order: list[str] = []

    def note(chunk: GenerationChunk | TrimserveError) -> None:
        if isinstance(chunk, Started):
            order.append(chunk.request_id)

    for number, (name, priority) in enumerate([("a", 0), ("b", 0), ("c", 5), ("d", -1), ("e", 5)]):
        engine.add(engine.prepare(request("p", name=name, priority=priority, max_new_tokens=2), note, number))
    while engine.has_work:
        engine.step()
    assert order == ["c", "e", "a", "b", "d"]


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_cancelling_frees_everything_at_once_and_says_nothing(num_steps: int) -> None:
    engine = make_engine(FakeModel(), max_batch=2)
    prompt = TokenPrompt((IMAGE, 65), (ImageFile(b"2"),))
    others = [start(engine, request("other", max_new_tokens=30)) for _ in range(2 if num_steps == 0 else 1)]
    sequence, output = start(engine, request(prompt, max_new_tokens=30))
    for _ in range(num_steps + 1):
        engine.step()
    before = len(output)
    assert (before > 0) == (num_steps > 0)
    engine.cancel(sequence)
    engine.cancel(sequence)
    assert engine.pool.used_cross_bytes == 0
    while engine.has_work:
        engine.step()
    assert engine.pool.used_self_bytes == 0
    assert len(output) == before
    assert sequence.state is SequenceState.ENDED
    assert all(text(other) == text(alone(FakeModel(), request("other", max_new_tokens=30))) for _, other in others)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_a_request_cancelled_between_two_layers_holds_nothing_and_the_next_one_begins(num_layers: int) -> None:
    model = FakeModel()
    engine = make_engine(model, max_batch=2, image_cache_bytes=2**20, prefill_slice_seconds=0)
    wanted = request(TokenPrompt((IMAGE, 65), (ImageFile(b"2"),)), max_new_tokens=5)
    first, said = start(engine, wanted)
    second, output = start(engine, wanted)
    # A layer of the image; the rest of it and a layer of the first prompt; of the second, in the same pass; the rest.
    for _ in range(num_layers):
        engine.step()
    assert bool(said) == (num_layers == 4)
    assert engine.pool.used_self_bytes > 0
    engine.cancel(first)
    assert engine.pool.used_self_bytes == (
        0 if second.request_state is SequenceState.WAITING else second.pages.self_bytes
    )
    while engine.has_work:
        engine.step()
    assert engine.pool.used_self_bytes == engine.pool.used_cross_bytes == 0
    assert output[:-1] == alone(FakeModel(), wanted)[:-1]
    # Who begins after an image was encoded in vain encodes it again; who begins later finds it.
    assert len(model.encoded) == (2 if num_layers == 1 else 1)


@pytest.mark.parametrize("bad", [BREAKS_PREFILL, BREAKS_DECODE, LOGITS_ARE_NAN])
def test_a_failing_request_ends_alone(bad: RawPrompt, caplog: pytest.LogCaptureFixture) -> None:
    model = FakeModel()
    engine = make_engine(model, max_batch=3)
    wanted = [request("left", temperature=1.0), request(bad, name="bad"), request("right")]
    left, failed, right = run(engine, *wanted)
    assert isinstance(failed[-1], RequestFailed)
    assert not any(isinstance(chunk, Finished | TrimserveError) for chunk in failed[:-1])
    [line] = (record for record in caplog.records if record.message == "request failed")
    assert line.__dict__["request_id"] == "bad"
    assert left[:-1] == alone(FakeModel(), wanted[0])[:-1]
    assert right[:-1] == alone(FakeModel(), wanted[2])[:-1]
    assert engine.pool.used_self_bytes == engine.pool.used_cross_bytes == 0
    assert text(run(engine, request("next"))[0]) == text(alone(FakeModel(), request("next")))


def _fails_in(calls: list[int], error: Exception) -> Callable[[], None]:
    """A hook that fails in its n-th calls, counted from 0."""
    counter = itertools.count()

    def hook() -> None:
        if next(counter) in calls:
            raise error

    return hook


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize(("stage", "calls"), [("before_prefill", [0, 1]), ("before_decode", [1, 2])])  # then alone
def test_a_request_that_runs_out_of_memory_ends_alone_and_may_come_again(
    error: Exception, stage: str, calls: list[int]
) -> None:
    model = FakeModel(**{stage: _fails_in(calls, error)})  # type: ignore[arg-type]  # hooks only
    engine = make_engine(model, max_batch=2)
    left, right = run(engine, request("left"), request("right"))
    assert isinstance(left[-1], EngineBusy)
    # 4 + 20 positions: 2 pages in 2 layers.
    assert "out of memory on request r: its KV takes up to 512 bytes" in str(left[-1])
    assert right[:-1] == alone(FakeModel(), request("right"))[:-1]
    assert engine.pool.used_self_bytes == engine.pool.used_cross_bytes == 0


@pytest.mark.parametrize("stage", ["before_prefill", "before_decode"])
def test_a_device_that_fails_ends_the_engine_and_nothing_is_tried_on_it_again(stage: str) -> None:
    calls = iter([1])

    def fail() -> None:
        assert next(calls, None) is not None, "the device was used after it had failed"
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    engine = make_engine(FakeModel(**{stage: fail}), max_batch=2)  # type: ignore[arg-type]  # hooks only
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        run(engine, request("left"), request("right"))


def test_stages_add_up_to_the_total() -> None:
    model = FakeModel(
        before_tokenize=_sleep(0.01),
        before_prefill=_sleep(0.02),
        before_decode=_sleep(0.005),
        max_model_len=64,
    )
    engine = make_engine(model, max_batch=1)
    first, second = run(engine, request("a", max_new_tokens=5), request("b", max_new_tokens=5))
    for output in (first, second):
        times = finished(output).timings
        stages = (times.queue_seconds, times.preprocess_seconds, times.vision_seconds, times.prefill_seconds)
        assert sum(stages) + times.decode_seconds == pytest.approx(times.total_seconds)
        assert times.preprocess_seconds >= 0.01
        assert times.prefill_seconds >= 0.02
        assert times.decode_seconds >= 4 * 0.005
        assert sum(stages) <= times.time_to_first_token_seconds < times.total_seconds
    # The second waited for the first.
    assert finished(second).timings.queue_seconds >= 0.02 + 4 * 0.005


def test_every_step_tells_how_many_it_decoded_and_how_long_that_took() -> None:
    steps: list[tuple[int, float]] = []
    clock = Clock()
    model = FakeModel(before_decode=clock.work(0.002))
    engine = make_engine(model, max_batch=2, on_step=lambda *step: steps.append(step), clock=clock)
    run(engine, *(request(prompt, max_new_tokens=4, ignore_eos=True) for prompt in "abc"))
    assert [size for size, _ in steps] == model.batch_sizes
    assert [seconds for _, seconds in steps] == pytest.approx([0.002] * len(steps))


PROMPTS: st.SearchStrategy[Prompt] = st.one_of(
    st.text(st.sampled_from("abc"), min_size=1, max_size=5).map(RawPrompt),
    st.just(TokenPrompt((IMAGE, 65), (ImageFile(b"2"),))),
    st.sampled_from([BREAKS_PREFILL, BREAKS_DECODE, LOGITS_ARE_NAN]),
)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(PROMPTS, st.integers(1, 8), st.integers(0, 12), st.none() | st.integers(0, 12))),
    st.integers(1, 4),
)
def test_whatever_comes_and_goes_nothing_is_lost(
    arrivals: list[tuple[Prompt, int, int, int | None]], max_batch: int
) -> None:
    engine = make_engine(FakeModel(), max_batch=max_batch)
    live: list[tuple[GenerationRequest, Sequence, Output, int | None]] = []
    for step in range(200):
        for prompt, max_new_tokens, arrives, cancelled in arrivals:
            if arrives == step:
                wanted = request(prompt, max_new_tokens=max_new_tokens, temperature=1.0)
                live.append((wanted, *start(engine, wanted), cancelled))
        for _, sequence, _, cancelled in live:
            if cancelled == step:
                engine.cancel(sequence)
        engine.step()
    assert not engine.has_work
    assert engine.pool.used_self_bytes == engine.pool.used_cross_bytes == 0
    for wanted, _, output, cancelled in live:
        expected = alone(FakeModel(), wanted)
        if output and isinstance(output[-1], Finished):
            assert output[:-1] == expected[:-1]
        elif output and isinstance(output[-1], TrimserveError):
            assert isinstance(expected[-1], RequestFailed)
            assert output[:-1] == expected[:-1]
        else:
            assert cancelled is not None
            assert output == expected[: len(output)]


def _sleep(seconds: float) -> Callable[[], None]:
    """A hook that takes time, where times are what is tested."""
    return lambda: time.sleep(seconds)  # stands in for work: the engine reads the clock
