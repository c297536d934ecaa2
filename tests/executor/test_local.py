"""What a local executor holds, and when it lets go."""

import gc
import weakref

import pytest
from torch import Tensor

from tests.engine.fake_model import IMAGE, FakeModel, request
from tests.engine.stepping import start
from trimserve.api.prompt import ImageFile, TokenPrompt
from trimserve.config import EngineConfig
from trimserve.engine import engine as module
from trimserve.engine.engine import Engine
from trimserve.engine.warm_up import warm_up
from trimserve.executor.local import LocalExecutor
from trimserve.model.interruptible import Interruptible
from trimserve.model.prepared import PreparedImage
from trimserve.trimming.encoded_image import EncodedImage, Observation


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
            self, image: PreparedImage, needs: frozenset[Observation] = frozenset()
        ) -> Interruptible[EncodedImage]:
            encoded = yield from super().encode_image(image, needs)
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
