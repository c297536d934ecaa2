"""What a local executor holds, and when it lets go."""

import gc
import weakref

import numpy as np
import pytest
from torch import Tensor

from tests.engine.fake_model import END, IMAGE, FakeModel, request
from tests.engine.stepping import start
from trimserve.api.prompt import ImageFile, TokenPrompt
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig
from trimserve.engine import engine as module
from trimserve.engine.engine import Engine
from trimserve.engine.warm_up import warm_up
from trimserve.executor.local import LocalExecutor
from trimserve.executor.plan import NewSequence, PageGrant, PrefillSlice, Rows, StepPlan
from trimserve.model.adapters import Adapter
from trimserve.model.interruptible import Interruptible
from trimserve.model.prepared import PreparedImage, PreparedPrompt
from trimserve.trimming.encoded_image import EncodedImage, Observation
from trimserve.trimming.plan import TrimPlan


def test_memory_is_measured_while_no_pages_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()
    executor = LocalExecutor(model)
    measured = []

    def available(_: str) -> int:
        measured.append(executor.pages is None)
        return 2**30

    monkeypatch.setattr(module, "available_bytes", available)
    warm_up(Engine(model, executor, EngineConfig()))
    assert measured == [True, True]
    assert executor.pages is not None


def test_a_prompt_that_is_cancelled_while_it_is_read_leaves_nothing_to_the_garbage_collector() -> None:
    features: list[weakref.ref[Tensor]] = []

    class Watched(FakeModel):
        def encode_image(
            self,
            image: PreparedImage,
            needs: frozenset[Observation] = frozenset(),
            adapter: Adapter | None = None,
        ) -> Interruptible[EncodedImage]:
            encoded = yield from super().encode_image(image, needs, adapter)
            features.append(weakref.ref(encoded.features))
            return encoded

    model = Watched()
    engine = Engine(model, LocalExecutor(model), EngineConfig(prefill_slice_seconds=0))
    sequence, output = start(engine, request(TokenPrompt((IMAGE, 65), (ImageFile(b"2"),))))
    engine.step()
    engine.step()
    gc.disable()
    try:
        engine.cancel(sequence)
        engine.step()
        assert features[0]() is None
    finally:
        gc.enable()
    assert not output


def test_rows_that_are_tried_alone_do_not_count_twice() -> None:
    def broken_once() -> None:
        if len(model.batch_sizes) == 1:
            model.batch_sizes.append(0)
            raise RuntimeError("once")

    model = FakeModel({"hi": "yes", "ho": "no!"}, before_decode=broken_once)
    engine = Engine(model, LocalExecutor(model), EngineConfig())
    outputs = [start(engine, request(text))[1] for text in ("hi", "ho")]
    while engine.has_work:
        engine.step()
    texts = ["".join(getattr(chunk, "text", "") for chunk in output) for output in outputs]
    assert texts == ["yes", "no!"]


def test_rows_may_name_several_tokens_in_place_of_the_one_that_was_drawn_last() -> None:
    executor = LocalExecutor(FakeModel({"hi": "yes!"}))
    executor.allocate(num_pages=8, layers_per_page=1)
    prompt = PreparedPrompt(tuple(b"hi"), ())
    new = NewSequence(0, "r", prompt, TrimPlan.of(TrimRequest()), SamplingParams(), frozenset({END}))
    pages = PageGrant(0, np.array([[0], [1]], dtype=np.int32), np.empty((3, 0), dtype=np.int32))
    first = executor.run(StepPlan(new=(new,), pages=(pages,), prefill=PrefillSlice((0,), seconds=1e9)))
    assert [drawn.token_id for drawn in first.drawn] == [ord("y")]
    second = executor.run(StepPlan(rows=(Rows(0, position=2, token_ids=tuple(b"yes")),)))
    assert [drawn.token_id for drawn in second.drawn] == [ord("!")]
