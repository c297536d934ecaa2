"""Several answers of one prompt: read once, held once, and each of them what it is alone."""

from contextlib import aclosing
from dataclasses import replace

import pytest

from tests.engine.driving import collect, held_bytes, running
from tests.engine.fake_model import IMAGE, LOGITS_ARE_NAN, FakeModel, request
from tests.engine.stepping import Clock, Output, alone, deltas, finished, make_engine, start
from tests.patience import soon, until
from trimserve.api.chunks import Finished, FinishReason, Started
from trimserve.api.prompt import ImageFile, TokenPrompt
from trimserve.api.request import GenerationRequest
from trimserve.engine.engine import Engine
from trimserve.engine.memory import prefill_scratch_bytes
from trimserve.engine.sequence import SequenceState
from trimserve.errors import RequestFailed

SCRATCH = prefill_scratch_bytes(FakeModel().info)
PAGE = 16 * 8  # one layer of 16 positions; text takes pages in 2 layers, features in 3
PICTURE = TokenPrompt((IMAGE, *b"what is this?"), (ImageFile(b"4"),))


def several(num_choices: int, prompt: TokenPrompt | str = PICTURE, **sampling: object) -> GenerationRequest:
    wanted = request(prompt, temperature=1.0, seed=2**64 - 2, max_new_tokens=20, ignore_eos=True)
    params = replace(wanted.sampling, **sampling)  # type: ignore[arg-type]  # keywords of every type
    return replace(wanted, num_choices=num_choices, sampling=params)


def run_to_the_end(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
    assert engine.pool.num_free_pages == engine.pool.num_pages


def answer(output: Output, choice: int) -> tuple[list[int], FinishReason]:
    """Tokens of one of the answers, and why it ended."""
    tokens = [token_id for delta in deltas(output) if delta.choice == choice for token_id in delta.token_ids]
    [end] = [chunk for chunk in output if isinstance(chunk, Finished) and chunk.choice == choice]
    assert end.num_generated_tokens == len(tokens)
    return tokens, end.reason


def assert_each_is_what_it_is_alone(output: Output, wanted: GenerationRequest) -> None:
    assert sum(isinstance(chunk, Started) for chunk in output) == 1
    for choice in range(wanted.num_choices):
        seed = (wanted.sampling.seed + choice) % 2**64
        one = replace(wanted, num_choices=1, sampling=replace(wanted.sampling, seed=seed))
        assert answer(output, choice) == answer(alone(FakeModel(), one), 0)


@pytest.mark.parametrize("max_batch", [1, 3, 8])
@pytest.mark.parametrize("prompt", [PICTURE, "x" * 15, "x" * 16, "x" * 17])
def test_each_answer_is_the_one_of_its_seed_alone(prompt: TokenPrompt | str, max_batch: int) -> None:
    engine, wanted = make_engine(FakeModel(), max_batch=max_batch), several(5, prompt)
    _, output = start(engine, wanted)
    run_to_the_end(engine)
    assert_each_is_what_it_is_alone(output, wanted)
    assert len({tuple(answer(output, choice)[0]) for choice in range(5)}) == 5


def test_prompt_and_image_are_computed_and_held_once() -> None:
    prefills: list[None] = []
    model = FakeModel(before_prefill=lambda: prefills.append(None))
    engine = make_engine(model, max_batch=8, clock=Clock())  # so that all join within one slice
    sequence, _ = start(engine, several(8, TokenPrompt((IMAGE, *b"x" * 39), (ImageFile(b"4"),))))
    engine.step()
    assert [each.state for each in sequence.family] == [SequenceState.RUNNING] * 8
    assert len(prefills) == len(model.encoded) == 1
    # 10 kept features in each of 3 layers; 2 full pages of the prompt in each of 2, and each answer has its own third
    # and fourth.
    assert engine.pool.used_cross_bytes == 3 * PAGE
    assert engine.pool.used_self_bytes == 2 * (2 + 8 * 2) * PAGE
    run_to_the_end(engine)


def test_answers_join_together_so_that_none_reads_the_prompt_again() -> None:
    prefills: list[None] = []
    engine = make_engine(FakeModel(before_prefill=lambda: prefills.append(None)), max_batch=4)
    others = [start(engine, request("other", max_new_tokens=size, ignore_eos=True))[0] for size in (5, 50)]
    sequence, output = start(engine, several(3, max_new_tokens=3))
    engine.step()
    assert [each.state for each in (*others, sequence)] == [*[SequenceState.RUNNING] * 2, SequenceState.WAITING]
    run_to_the_end(engine)
    assert len(prefills) == 3
    assert_each_is_what_it_is_alone(output, several(3, max_new_tokens=3))


def test_answers_end_each_for_itself() -> None:
    # The first token is one of many, so that the answers part there.
    engine, wanted = make_engine(FakeModel(), max_batch=8), several(8, stop_token_ids=tuple(range(32, 64)))
    _, output = start(engine, wanted)
    run_to_the_end(engine)
    assert_each_is_what_it_is_alone(output, wanted)
    ends = {answer(output, choice)[1] for choice in range(8)}
    lengths = {len(answer(output, choice)[0]) for choice in range(8)}
    assert ends == {FinishReason.STOP}
    assert len(lengths) > 2


def test_answers_of_one_token_all_come() -> None:
    engine, wanted = make_engine(FakeModel()), several(4, max_new_tokens=1)
    _, output = start(engine, wanted)
    run_to_the_end(engine)
    assert_each_is_what_it_is_alone(output, wanted)


def test_who_cancels_ends_all_answers() -> None:
    engine = make_engine(FakeModel(), max_batch=2)
    sequence, output = start(engine, several(4))
    engine.step()
    engine.cancel(sequence)
    said = len(output)
    run_to_the_end(engine)
    assert len(output) == said
    assert {each.state for each in sequence.family} == {SequenceState.ENDED}
    assert sequence.pixel_bytes == 0


def test_what_fails_in_one_answer_ends_the_request_once() -> None:
    engine = make_engine(FakeModel(), max_batch=4)
    _, output = start(engine, several(4, LOGITS_ARE_NAN.text))
    _, other = start(engine, request("other"))
    run_to_the_end(engine)
    assert [type(chunk) for chunk in output if isinstance(chunk, Exception)] == [RequestFailed]
    assert finished(other)


@pytest.mark.parametrize("num_pages", [16, 20, 28, 40])
def test_preempted_answers_go_on_as_they_were(num_pages: int) -> None:
    engine = make_engine(FakeModel(), max_batch=8, kv_cache_bytes=SCRATCH + num_pages * PAGE)
    wanted = [several(4, max_new_tokens=60), several(3, "text", max_new_tokens=70, seed=9)]
    outputs = [start(engine, one)[1] for one in wanted]
    run_to_the_end(engine)
    assert engine.num_preemptions
    for output, one in zip(outputs, wanted, strict=True):
        assert_each_is_what_it_is_alone(output, one)


def test_a_preempted_answer_reads_its_own_tokens_only_while_another_has_the_prompt() -> None:
    engine = make_engine(FakeModel(), max_batch=8)
    sequence, output = start(engine, several(2))
    while len(deltas(output)) < 2 * 6:
        engine.step()
    engine.preempt(sequence.family[1])
    run_to_the_end(engine)
    assert engine.num_recomputed_tokens == 5
    assert_each_is_what_it_is_alone(output, several(2))


async def test_the_stream_ends_when_every_answer_has() -> None:
    wanted = several(4, stop_token_ids=tuple(range(32, 64)))
    async with running(FakeModel()) as runner:
        output: Output = [*await soon(collect(runner, wanted))]
        assert (runner.status().num_running, held_bytes(runner)) == (0, 0)
    assert_each_is_what_it_is_alone(output, wanted)


async def test_a_client_that_goes_frees_the_pages_of_all_answers() -> None:
    async with running(FakeModel(), max_batch=4) as runner:
        async with aclosing(runner.submit(several(4, max_new_tokens=100))) as chunks:
            async for chunk in chunks:
                if isinstance(chunk, Started):
                    assert runner.status().pixel_bytes > 0
                    break
        await until(lambda: held_bytes(runner) == 0)
        assert (runner.status().num_running, runner.status().pixel_bytes) == (0, 0)
