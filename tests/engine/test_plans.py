"""Plans and results are plain data, and what the engine keeps of a sequence is enough to compute it again."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.engine.fake_model import FakeModel, request
from tests.engine.stepping import Output, deltas, run, start
from tests.engine.test_real_model import REQUESTS
from tests.executor.executors import PicklingExecutor, ProcessExecutor
from trimserve.api.chunks import Finished, Started
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.engine import Engine
from trimserve.executor.executor import Executor
from trimserve.executor.local import LocalExecutor
from trimserve.executor.plan import NewSequence, StepPlan, StepResult
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

CONFIG = EngineConfig(max_batch=len(REQUESTS))


def load(folder: Path) -> Mllama:
    """Load it."""
    return load_model(ModelConfig(model=str(folder)), EngineConfig())


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Mllama:
    """In this process."""
    return load(checkpoint)


@pytest.fixture(scope="module")
def elsewhere(checkpoint: Path) -> Iterator[ProcessExecutor]:
    """The same checkpoint in another process."""
    executor = ProcessExecutor(partial(load, checkpoint))
    yield executor
    executor.close()


def answers(outputs: list[Output]) -> list[object]:
    """What does not depend on time: the first chunk, and all tokens."""
    return [(output[0], [delta.token_ids for delta in deltas(output)]) for output in outputs]


@pytest.fixture(scope="module")
def expected(model: Mllama) -> list[object]:
    """Answers of an engine and an executor that share objects."""
    return answers(run(Engine(model, LocalExecutor(model), CONFIG), *REQUESTS))


def test_plans_and_results_can_be_pickled(model: Mllama, expected: list[object]) -> None:
    assert answers(run(Engine(model, PicklingExecutor(LocalExecutor(model)), CONFIG), *REQUESTS)) == expected


def test_an_executor_may_run_in_another_process(
    model: Mllama, elsewhere: ProcessExecutor, expected: list[object]
) -> None:
    assert answers(run(Engine(model, elsewhere, CONFIG), *REQUESTS)) == expected


class Recording:
    """An executor that notes what is new to it."""

    def __init__(self, executor: Executor) -> None:
        """Of another one."""
        self._executor = executor
        self.info, self.runs_ahead, self.allocate = executor.info, executor.runs_ahead, executor.allocate
        self.free_pages, self.warm_up = executor.free_pages, executor.warm_up
        self.load_adapter, self.unload_adapter = executor.load_adapter, executor.unload_adapter
        self.compile, self.watch, self.close = executor.compile, executor.watch, executor.close
        self.new: list[NewSequence] = []

    def run(self, plan: StepPlan) -> StepResult:
        self.new.extend(plan.new)
        return self._executor.run(plan)


@pytest.mark.parametrize("after", [2, 7])
def test_a_sequence_that_was_dropped_is_computed_again_with_its_tokens_and_kept_sets(
    model: Mllama, expected: list[object], after: int
) -> None:
    executor = Recording(PicklingExecutor(LocalExecutor(model)))
    engine = Engine(model, executor, CONFIG)
    started = [start(engine, wanted) for wanted in REQUESTS]
    dropped = set()
    while engine.has_work:
        for number, (sequence, output) in enumerate(started):
            if number not in dropped and len(deltas(output)) >= after:
                dropped.add(number)
                engine.preempt(sequence)
        engine.step()
    outputs = [output for _, output in started]
    assert answers(outputs) == expected
    for output in outputs:
        assert sum(isinstance(chunk, Started) for chunk in output) == 1
        assert isinstance(output[-1], Finished)
    again = [each for each in executor.new if each.generated_token_ids]
    assert {each.request_id for each in again} == {each.request_id for each in REQUESTS}
    assert all(len(each.generated_token_ids) >= after for each in again)
    for each in again:
        assert each.stored is not None
        assert bool(each.stored.sets) == bool(each.prompt.images and each.trim.policy)
    assert engine.pool.num_free_pages == engine.pool.num_pages


def test_a_sequence_that_is_dropped_while_its_prompt_is_read_begins_again() -> None:
    model = FakeModel({"hi": "yes"})
    engine = Engine(model, LocalExecutor(model), EngineConfig(prefill_slice_seconds=0))
    sequence, output = start(engine, request("hi"))
    engine.step()
    assert not output
    engine.preempt(sequence)
    assert engine.pool.num_free_pages == engine.pool.num_pages
    while engine.has_work:
        engine.step()
    assert "".join(delta.text for delta in deltas(output)) == "yes"


def test_a_dropped_sequence_that_is_cancelled_while_it_waits_says_nothing_more() -> None:
    model = FakeModel()
    engine = Engine(model, LocalExecutor(model), EngineConfig(max_batch=1))
    sequence, output = start(engine, request("hi", max_new_tokens=9, ignore_eos=True))
    engine.step()
    said = len(output)
    engine.preempt(sequence)
    engine.add(engine.prepare(request("other"), lambda _: None, time.monotonic()))
    engine.cancel(sequence)
    while engine.has_work:
        engine.step()
    assert len(output) == said
    assert engine.pool.num_free_pages == engine.pool.num_pages
