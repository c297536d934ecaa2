"""Small prompts that wait together are read in one pass over the layers, and are answered as if each were alone."""

import pytest

from tests.engine.fake_model import BREAKS_PREFILL, IMAGE, FakeModel, request
from tests.engine.stepping import Clock, Output, alone, finished, make_engine, run, start, text
from trimserve.api.prompt import ImageFile, TokenPrompt
from trimserve.api.request import GenerationRequest
from trimserve.errors import RequestFailed

ABOUT_AN_IMAGE, ABOUT_ANOTHER = (
    request(TokenPrompt((IMAGE, 65 + number), (ImageFile(tiles),))) for number, tiles in enumerate((b"2", b"3"))
)


def assert_answered_as_alone(outputs: list[Output], wanted: list[GenerationRequest]) -> None:
    for output, each in zip(outputs, wanted, strict=True):
        assert text(output) == text(alone(FakeModel(), each))


def test_prompts_that_wait_together_share_a_pass() -> None:
    model, wanted = FakeModel(), [request(name, name=name) for name in ("one", "two", "three")]
    outputs = run(make_engine(model), *wanted)
    assert model.passes == [3]
    assert_answered_as_alone(outputs, wanted)


def test_a_prompt_shares_no_pass_with_more_tokens_than_a_piece_has() -> None:
    model, wanted = FakeModel(), [request("x" * 100, max_new_tokens=2) for _ in range(12)]
    outputs = run(make_engine(model, max_batch=12), *wanted)
    assert model.passes == [10, 2]
    assert_answered_as_alone(outputs, wanted)


def test_a_prompt_whose_image_must_be_encoded_holds_no_text_up() -> None:
    model, wanted = FakeModel(), [request("one"), ABOUT_AN_IMAGE, request("two")]
    outputs = run(make_engine(model), *wanted)
    assert model.passes == [2, 1]
    assert_answered_as_alone(outputs, wanted)


def test_questions_on_an_image_that_is_known_share_a_pass() -> None:
    model, wanted = FakeModel(), [ABOUT_AN_IMAGE, ABOUT_ANOTHER, ABOUT_AN_IMAGE, request("text")]
    outputs = run(make_engine(model, image_cache_bytes=2**20), *wanted)
    assert model.passes == [3, 1]
    assert len(model.encoded) == 2
    assert_answered_as_alone(outputs, wanted)


def test_images_of_one_pass_are_no_more_than_a_request_may_have() -> None:
    model = FakeModel()
    engine = make_engine(model, image_cache_bytes=2**20)
    run(engine, ABOUT_AN_IMAGE)
    run(engine, *[ABOUT_AN_IMAGE] * 9)  # of 2 tiles each, and a request may have 4 images of 4 tiles
    assert model.passes == [1, 8, 1]


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_prompt_that_is_cancelled_in_a_shared_pass_leaves_the_others_alone(num_steps: int) -> None:
    model, wanted = FakeModel(), [request(name) for name in ("one", "two", "three")]
    engine = make_engine(model, prefill_slice_seconds=0)
    started = [start(engine, each) for each in wanted]
    for _ in range(num_steps):
        engine.step()
    engine.cancel(started[1][0])
    others = run(engine, request("late"))  # is granted the pages that came free
    assert_answered_as_alone([started[0][1], started[2][1], *others], [wanted[0], wanted[2], request("late")])
    assert engine.pool.used_self_bytes == 0


def test_a_prompt_that_is_cancelled_while_it_waits_for_an_image_of_another_joins_no_pass() -> None:
    model, wanted = FakeModel(), [ABOUT_AN_IMAGE, request("one"), request("two")]
    engine = make_engine(model, prefill_slice_seconds=0)
    started = [start(engine, each) for each in wanted]
    engine.step()
    engine.cancel(started[1][0])
    while engine.has_work:
        engine.step()
    assert model.passes == [2]
    assert_answered_as_alone([started[0][1], started[2][1]], [wanted[0], wanted[2]])
    assert not started[1][1]


def test_a_prompt_that_breaks_a_shared_pass_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    model, wanted = FakeModel(), [request("left"), request(BREAKS_PREFILL, name="bad"), request("right")]
    left, failed, right = run(make_engine(model), *wanted)
    assert isinstance(failed[-1], RequestFailed)
    assert_answered_as_alone([left, right], [wanted[0], wanted[2]])
    assert model.passes == [3, 1, 1, 1]
    assert "reading 3 prompts together failed" in caplog.text


def test_what_a_request_waits_for_before_its_prompt_is_begun_is_queueing() -> None:
    clock = Clock()
    model = FakeModel(before_layer=clock.work(1.0))
    engine = make_engine(model, clock=clock)
    outputs = run(engine, ABOUT_AN_IMAGE, ABOUT_ANOTHER)
    timings = [finished(output).timings for output in outputs]
    assert timings[1].queue_seconds > timings[0].queue_seconds
