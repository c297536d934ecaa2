"""A step begun before the tokens of the one before it are read changes no answer, and little is computed in vain."""

from dataclasses import replace
from typing import Any

import pytest

from tests.engine.fake_model import BREAKS_DECODE, LOGITS_ARE_NAN, FakeModel, request
from tests.engine.stepping import Output, run, start, text
from trimserve.api.chunks import GenerationChunk, TokenDelta
from trimserve.api.prompt import RawPrompt
from trimserve.api.request import GenerationRequest
from trimserve.config import EngineConfig
from trimserve.engine.engine import Engine
from trimserve.errors import RequestFailed, TrimserveError
from trimserve.executor.local import LocalExecutor
from trimserve.executor.sampling import Sampling
from trimserve.ops import PAGE_POSITIONS

SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 3, "num_top_logprobs": 2, "ignore_eos": True}


def make(model: FakeModel, *, runs_ahead: bool = True, **config: Any) -> Engine:
    """An engine that begins steps ahead, though its device is a CPU."""
    executor = LocalExecutor(model, runs_ahead=runs_ahead)
    return Engine(model, executor, EngineConfig(**{"image_cache_bytes": 0, **config}))


def watch(model: FakeModel, engine: Engine, wanted: GenerationRequest) -> tuple[list[int], Output]:
    """How many steps have begun when each token comes out."""
    output: Output = []
    counts: list[int] = []

    def sink(chunk: GenerationChunk | TrimserveError) -> None:
        output.append(chunk)
        if isinstance(chunk, TokenDelta):
            counts.append(len(model.batch_sizes))

    engine.add(engine.prepare(wanted, sink, 0.0))
    while engine.has_work:
        engine.step()
    return counts, output


def test_a_step_begins_before_the_tokens_of_the_one_before_it_come_out() -> None:
    model = FakeModel({"hi": "abcd"})
    counts, output = watch(model, make(model), request("hi", max_new_tokens=4))
    assert text(output) == "abcd"
    # The first token is the prompt's. Of the second one's step on, the next step is under way; behind the last one
    # that may come there is none.
    assert counts == [0, 2, 3, 3]


def test_an_executor_that_does_not_run_ahead_begins_a_step_when_it_is_asked_to() -> None:
    model = FakeModel({"hi": "abcd"})
    counts, _ = watch(model, make(model, runs_ahead=False), request("hi", max_new_tokens=4))
    assert counts == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("reply", "sampling", "in_vain"),
    [("yes", {}, 1), ("yes, no", {"stop_strings": (",",)}, 1), ("yes", {"max_new_tokens": 3}, 0)],
    ids=["an end token", "a stop string", "the limit"],
)
def test_at_most_a_token_is_computed_in_vain(reply: str, sampling: dict[str, Any], in_vain: int) -> None:
    model = FakeModel({"hi": reply})
    [output] = run(make(model), request("hi", **sampling))
    expected = FakeModel({"hi": reply})
    assert output[1:-1] == run(make(expected, runs_ahead=False), request("hi", **sampling))[0][1:-1]
    assert text(output) == "yes"
    assert len(model.batch_sizes) == len(expected.batch_sizes) + in_vain


def test_requests_that_come_and_go_get_what_they_get_without() -> None:
    def answers(*, runs_ahead: bool) -> list[list[TokenDelta]]:
        model = FakeModel({"a": "first one ends", "b": "second"})
        engine = make(model, runs_ahead=runs_ahead, max_batch=3, prefill_slice_seconds=1000)
        wanted = [
            request("a"),
            request("b", name="s"),
            request("cc", **SAMPLED, max_new_tokens=9),
            request("dd", **SAMPLED, max_new_tokens=12, min_new_tokens=12),
            replace(request("ee", **SAMPLED, max_new_tokens=7), num_choices=2),
        ]
        outputs = []
        for each in wanted:
            outputs.append(start(engine, each)[1])
            engine.step()
            engine.step()
        while engine.has_work:
            engine.step()
        assert engine.pool.num_free_pages == engine.pool.num_pages
        return [[chunk for chunk in output if isinstance(chunk, TokenDelta)] for output in outputs]

    assert answers(runs_ahead=True) == answers(runs_ahead=False)


def test_who_joins_is_in_the_step_after_the_one_that_was_begun() -> None:
    model = FakeModel({"a": "aaaaaaaaaa", "b": "bbb"})
    engine = make(model)
    start(engine, request("a"))
    engine.step()
    engine.step()
    _, output = start(engine, request("b"))
    before = len(model.batch_sizes)
    engine.step()
    assert text(output) == "b"  # the prompt's
    assert model.batch_sizes[before:] == [2]
    engine.step()
    assert text(output) == "bb"


def test_pages_of_one_that_is_cancelled_serve_another_at_once() -> None:
    model = FakeModel({"a": "a" * 40, "b": "b" * 40, "c": "c" * 40})
    engine = make(model, max_batch=2)
    [first, _], [_, kept] = (
        start(engine, request("a", max_new_tokens=40)),
        start(engine, request("b", max_new_tokens=40)),
    )
    for _ in range(5):
        engine.step()
    engine.cancel(first)
    _, late = start(engine, request("c", max_new_tokens=40))
    while engine.has_work:
        engine.step()
    assert (text(kept), text(late)) == ("b" * 40, "c" * 40)


@pytest.mark.parametrize("broken", [BREAKS_DECODE, LOGITS_ARE_NAN])
def test_a_request_that_fails_in_a_step_that_was_begun_fails_alone(broken: RawPrompt) -> None:
    model = FakeModel({"a": "unharmed"})
    engine = make(model)
    _, output = start(engine, request("a"))
    _, failed = start(engine, request(broken, name="broken", ignore_eos=True))
    while engine.has_work:
        engine.step()
    assert text(output) == "unharmed"
    assert isinstance(failed[-1], RequestFailed)


@pytest.mark.parametrize("sampling", [{"repetition_penalty": 1.1}, {"presence_penalty": 0.5}])
def test_what_needs_to_know_every_token_waits_for_each(sampling: dict[str, Any]) -> None:
    model = FakeModel({"hi": "abcd"})
    counts, output = watch(model, make(model), request("hi", max_new_tokens=4, **sampling))
    assert counts == [0, 1, 2, 3]
    assert text(output) == "abcd"


def test_where_pages_are_few_a_step_is_not_begun_ahead_and_nobody_is_preempted_for_it() -> None:
    model = FakeModel({"a": "a" * 60, "b": "b" * 60})
    engine = make(model)
    num_pages = 2 * engine.pool.self_pages(61)
    of_others = engine.pool.allocate(PAGE_POSITIONS * (engine.pool.num_free_pages - num_pages) // 2)
    outputs = run(engine, *(request(each, max_new_tokens=60) for each in "ab"))
    assert [text(output) for output in outputs] == ["a" * 60, "b" * 60]
    assert engine.num_preemptions == 0
    of_others.release()


def test_top_p_that_needs_more_candidates_draws_again_and_what_was_begun_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tokens(*, runs_ahead: bool) -> tuple[list[int], int]:
        model = FakeModel()
        [output] = run(make(model, runs_ahead=runs_ahead), request("zz", **SAMPLED, max_new_tokens=12))
        drawn = [token_id for chunk in output if isinstance(chunk, TokenDelta) for token_id in chunk.token_ids]
        return drawn, len(model.batch_sizes)

    expected, num_steps = tokens(runs_ahead=False)
    monkeypatch.setattr(Sampling.__init__, "__defaults__", ((2,),))
    drawn, num_more = tokens(runs_ahead=True)
    assert drawn == expected
    assert num_more > num_steps
