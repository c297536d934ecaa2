"""Pages grow with the text: who joins, who is preempted when the pool is short, and that everybody gets to the end."""

import itertools
import random

import pytest

from tests.engine.fake_model import IMAGE, FakeModel, request
from tests.engine.stepping import Output, alone, finished, make_engine, start, text
from trimserve.api.chunks import Started
from trimserve.api.prompt import ImageFile, TokenPrompt
from trimserve.engine.engine import Engine
from trimserve.engine.memory import prefill_scratch_bytes
from trimserve.engine.sequence import Sequence, SequenceState
from trimserve.executor.plan import StepPlan, StepResult

SCRATCH = prefill_scratch_bytes(FakeModel().info)
PAGE = 16 * 8  # one layer of 16 positions; text takes pages in 2 layers, features in 3


def engine_of(num_pages: int, slice_seconds: float = 1.0) -> Engine:
    size = SCRATCH + num_pages * PAGE
    return make_engine(FakeModel(), max_batch=8, kv_cache_bytes=size, prefill_slice_seconds=slice_seconds)


def run_to_the_end(engine: Engine, most_steps: int) -> None:
    steps = itertools.count()
    while engine.has_work:
        engine.step()
        assert next(steps) < most_steps
    assert engine.pool.num_free_pages == engine.pool.num_pages


def test_a_request_joins_with_a_page_beyond_its_prompt_whatever_it_may_come_to() -> None:
    # All of 100 tokens take 2 * 7 pages, so a pool of 16 held one such request.
    engine = engine_of(num_pages=16)
    started = [start(engine, request("five!", name=name, max_new_tokens=100)) for name in "abcd"]
    engine.step()
    assert {sequence.state for sequence, _ in started} == {SequenceState.RUNNING}
    assert engine.pool.num_free_pages == 0


def test_text_that_grows_over_many_pages_is_the_text_of_an_ample_pool() -> None:
    engine, wanted = engine_of(num_pages=16), request("hi", max_new_tokens=100, ignore_eos=True)
    _, output = start(engine, wanted)
    run_to_the_end(engine, 110)
    assert text(output) == text(alone(FakeModel(), wanted))
    assert engine.num_preemptions == 0


def test_the_executor_hears_of_new_pages_only() -> None:
    engine = engine_of(num_pages=16)
    plans: list[StepPlan] = []
    executor = engine._executor
    take = executor.run

    def run(plan: StepPlan) -> StepResult:
        plans.append(plan)
        return take(plan)

    executor.run = run  # type: ignore[method-assign]  # a spy
    start(engine, request("hi", max_new_tokens=60, ignore_eos=True))
    run_to_the_end(engine, 70)
    grants = [grant for plan in plans for grant in plan.pages]
    assert [grant.self_pages.shape[1] for grant in grants] == [2, 3, 4]


def test_the_youngest_of_the_lowest_priority_is_preempted() -> None:
    engine = engine_of(num_pages=4 * 4)
    wanted = [("old", 0), ("urgent", 1), ("young", 0), ("urgent too", 1)]
    started = {
        name: start(engine, request("p", name=name, priority=priority, max_new_tokens=60, ignore_eos=True))
        for name, priority in wanted
    }
    preempted: list[str] = []
    take = engine.preempt

    def preempt(sequence: Sequence) -> None:
        preempted.append(sequence.request_id)
        take(sequence)

    engine.preempt = preempt  # type: ignore[method-assign]  # a spy
    run_to_the_end(engine, 400)
    assert preempted == ["young", "old"]
    for name, priority in wanted:
        alike = request("p", name=name, priority=priority, max_new_tokens=60, ignore_eos=True)
        assert text(started[name][1]) == text(alone(FakeModel(), alike))


def test_a_preempted_request_says_nothing_twice_and_is_counted() -> None:
    engine = engine_of(num_pages=2 * 4)
    outputs = [start(engine, request("p" * 5, name=name, max_new_tokens=40, ignore_eos=True))[1] for name in "ab"]
    run_to_the_end(engine, 200)
    for output in outputs:
        assert sum(isinstance(chunk, Started) for chunk in output) == 1
        assert finished(output).num_generated_tokens == 40
    assert engine.num_preemptions == 1
    # Both had 2 pages a layer; with 28 tokens drawn the first one needed a third; the last of them
    # is not read again, but the row of the next step.
    assert engine.num_recomputed_tokens == 5 + 27


def test_room_for_the_next_token_comes_before_newcomers() -> None:
    engine = engine_of(num_pages=6)
    _, first = start(engine, request("p" * 15, max_new_tokens=30, ignore_eos=True))
    engine.step()
    assert engine.pool.num_free_pages == 2
    while len(first) < 1 + 18:
        engine.step()
    newcomer, _ = start(engine, request("a", max_new_tokens=1))
    engine.step()  # the 33rd position takes the last pages
    assert newcomer.state is SequenceState.WAITING
    assert engine.num_preemptions == 0


@pytest.mark.parametrize("seed", [seed for seed in range(21) if seed != 5])  # 5 draws requests that all fit
def test_everybody_gets_to_the_end_in_the_smallest_pool(seed: int) -> None:
    rng = random.Random(seed)
    picture = TokenPrompt((IMAGE, 65), (ImageFile(b"4"),))
    prompts = [picture if rng.random() < 0.5 else "a" * rng.randint(1, 40) for _ in range(12)]
    wanted = [
        request(prompt, name=str(n), priority=rng.randint(0, 2), max_new_tokens=rng.randint(1, 80), ignore_eos=True)
        for n, prompt in enumerate(prompts)
    ]
    # As many pages as the largest request takes alone.
    sizes = [2 * -(-(_num_tokens(prompt) + 80) // 16) + 3 * 2 for prompt in prompts]
    engine = engine_of(max(sizes), rng.choice([0.0, 1.0]))
    outputs: list[Output] = [start(engine, one)[1] for one in wanted]
    # Each step draws a token of the most urgent request, or reads a layer of a prompt.
    run_to_the_end(engine, 12 * (80 + 12 * 8))
    assert engine.num_preemptions
    for output, one in zip(outputs, wanted, strict=True):
        assert text(output) == text(alone(FakeModel(), one))


def _num_tokens(prompt: str | TokenPrompt) -> int:
    return len(prompt.token_ids if isinstance(prompt, TokenPrompt) else prompt)
