"""Answers with drafts are those without: tokens, log-probabilities, text and ends, whoever drafts and how well.

`--speculated 500` draws as many requests as `make verify` does. The clock stands still, so that no step seems dear and
drafts are checked wherever there is room.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ByteSize
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MllamaForConditionalGeneration

from tests.engine.draft_model import DraftModel
from tests.engine.fake_model import END, FakeModel, request
from tests.engine.stepping import Clock, Output, deltas, finished, make_engine, run, start, text
from tests.engine.test_real_model import ONE, THREE
from tests.executor.executors import PicklingExecutor
from trimserve.api.chunks import Finished, TokenDelta
from trimserve.api.constraint import Choice, Constraint, JsonSchema, Regex
from trimserve.api.prompt import RawPrompt
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.engine import Engine
from trimserve.engine.memory import prefill_scratch_bytes
from trimserve.engine.repeats import Repeats
from trimserve.engine.speculation import Speculation
from trimserve.errors import RequestFailed
from trimserve.executor.drafter import Drafter, Text
from trimserve.executor.local import LocalExecutor
from trimserve.model.key_values import KeyValues
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

TOKEN_GAP = 1e-3
LOGPROB_GAP = 1e-4
"""Of the log-probabilities of the two likeliest tokens: below it rounding may decide between them."""

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "maximum": 99}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
)
CONSTRAINTS: tuple[Constraint, ...] = (
    JsonSchema(SCHEMA),
    Regex("(red, green, blue; ){4}[a-z]{3}"),
    Choice(("one and the same, one and the same", "one and another")),
)
PROMPTS = (
    RawPrompt("over and over and over and over and over"),
    RawPrompt("a red one, a green one, a blue one; a red one, a green one"),
    ONE,
    THREE,
)


def draw_request(rng: random.Random, number: int, vocab_size: int) -> GenerationRequest:
    """A request with anything that may change what is drawn, or where it ends."""
    may_penalize = rng.random() < 0.5
    least = rng.choice([0, 0, 12])
    params = SamplingParams(
        max_new_tokens=rng.randint(1, 40),
        min_new_tokens=least,
        ignore_eos=rng.random() < 0.3,
        temperature=rng.choice([0.0, 0.3, 1.0]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 20]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.1, 1.5]) if may_penalize else 1.0,
        presence_penalty=rng.uniform(-1, 1) if may_penalize else 0.0,
        frequency_penalty=rng.uniform(-1, 1) if may_penalize else 0.0,
        logit_bias={rng.randrange(vocab_size): rng.uniform(-3, 6) for _ in range(rng.choice([0, 3]))},
        seed=rng.randint(0, 3),
        stop_strings=tuple(rng.sample(["e", "th", "a b", "qq", "zo"], rng.choice([0, 2]))),
        stop_token_ids=tuple(rng.sample(range(vocab_size), rng.choice([0, 3]))),
        num_top_logprobs=2,
    )
    constraint = rng.choice(CONSTRAINTS) if rng.random() < 0.4 else None
    params = replace(params, max_new_tokens=max(params.max_new_tokens or 1, least, 1))
    trim = TrimRequest(k_ratio=0.1)
    choices = rng.choice([1, 1, 1, 2])
    return GenerationRequest(f"r{number}", rng.choice(PROMPTS), params, trim, choices, constraint=constraint)


class Prophet:
    """Knows the answers, and is wrong now and then, even about what a constraint allows."""

    def __init__(self, answers: Sequence[Sequence[int]], vocab_size: int) -> None:
        """Of these texts, prompt and answer."""
        self._answers = [tuple(answer) for answer in answers]
        self._rng = random.Random("prophet")
        self._vocab_size = vocab_size
        self.forgotten: list[int] = []

    def propose(self, texts: Sequence[Text], most: int) -> list[list[int]]:
        return [[self._blurred(token_id) for token_id in self._next(each, most)] for each in texts]

    def forget(self, sequence: int) -> None:
        self.forgotten.append(sequence)

    def _next(self, known_text: Text, most: int) -> tuple[int, ...]:
        known = (*known_text.prompt_token_ids, *known_text.generated_token_ids)
        found = (each for each in self._answers if each[: len(known)] == known)
        return next(found, known)[len(known) :][:most]

    def _blurred(self, token_id: int) -> int:
        return self._rng.randrange(self._vocab_size) if self._rng.random() < 0.15 else token_id


def speculative(model: Mllama, drafter: Drafter, **config: object) -> Engine:
    """An engine that checks drafts wherever there is room, over a pipe."""
    clock = Clock()
    knobs = EngineConfig(**{"image_cache_bytes": 0, **config})  # type: ignore[arg-type]  # knobs of every type
    return Engine(model, PicklingExecutor(LocalExecutor(model, clock=clock)), knobs, clock=clock, drafter=drafter)


def answers(output: Output) -> list[tuple[object, ...]]:
    """Of each choice its tokens, its text, and its end."""
    ends = [chunk for chunk in output if isinstance(chunk, Finished)]
    found: list[tuple[object, ...]] = []
    for end in sorted(ends, key=lambda end: end.choice):
        own = [delta for delta in deltas(output) if delta.choice == end.choice]
        tokens = [delta.token_ids for delta in own]
        found.append((tokens, "".join(delta.text for delta in own), replace(end, timings=None)))  # type: ignore[arg-type]  # left out
    return found


def logprobs(output: Output) -> list[float]:
    """Of all tokens and of those that each was chosen among, choice by choice."""
    own = sorted(deltas(output), key=lambda delta: delta.choice)
    told = [each for delta in own for each in delta.logprobs]
    return [value for each in told for value in (each.logprob, *(logprob for _, logprob in each.top))]


def is_near_tie(output: Output, expected: Output) -> bool:
    """Whether the first token that differs is one that rounding may decide."""
    pairs = zip(deltas(output), deltas(expected), strict=False)
    parted: TokenDelta = next(theirs for ours, theirs in pairs if ours.token_ids != theirs.token_ids)
    (_, best), (_, second) = parted.logprobs[0].top
    return best - second < TOKEN_GAP


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Mllama:
    return load_model(ModelConfig(model=str(checkpoint)), EngineConfig())


@pytest.fixture(scope="module")
def wanted(model: Mllama, speculated: int) -> list[GenerationRequest]:
    rng = random.Random("speculation")
    return [draw_request(rng, number, model.info.vocab_size) for number in range(speculated)]


@pytest.fixture(scope="module")
def expected(model: Mllama, wanted: list[GenerationRequest]) -> list[Output]:
    return run(make_engine(model), *wanted)


def prophet(model: Mllama, wanted: Sequence[GenerationRequest], expected: Sequence[Output]) -> Prophet:
    texts = []
    for one, output in zip(wanted, expected, strict=True):
        prompt = model.tokenize(one.prompt).token_ids
        for choice in range(one.num_choices):
            own = [token for delta in deltas(output) if delta.choice == choice for token in delta.token_ids]
            texts.append((*prompt, *own))
    return Prophet(texts, model.info.vocab_size)


@pytest.mark.parametrize("is_tight", [False, True])
def test_answers_are_those_without_drafts(
    model: Mllama, wanted: list[GenerationRequest], expected: list[Output], is_tight: bool
) -> None:
    pool = {"kv_cache_bytes": ByteSize(prefill_scratch_bytes(model.info) + 2**18)} if is_tight else {}
    drafter = prophet(model, wanted, expected) if is_tight else Repeats()
    engine = speculative(model, drafter, max_batch=24, **pool)
    outputs = run(engine, *wanted)
    by_rounding = 0
    for one, output, alone in zip(wanted, outputs, expected, strict=True):
        if answers(output) != answers(alone):
            assert is_near_tie(output, alone), one
            by_rounding += 1
        else:  # more rows than 48 are added up in another order
            assert logprobs(output) == pytest.approx(logprobs(alone), abs=LOGPROB_GAP)
    assert by_rounding <= len(wanted) // 100
    assert engine.speculation.num_accepted > engine.speculation.num_proposed / (2 if is_tight else 10) > 0
    assert bool(engine.num_preemptions) == is_tight
    assert engine.pool.num_free_pages == engine.pool.num_pages


def steps(engine: Engine, wanted: GenerationRequest) -> tuple[Output, list[int]]:
    """The answer, and how many tokens each step brought."""
    _, output = start(engine, wanted)
    counts = []
    while engine.has_work:
        before = len(deltas(output))
        engine.step()
        counts.append(len(deltas(output)) - before)
    return output, counts


GREEDY_TEXT = replace(request("over and over and"), sampling=SamplingParams(max_new_tokens=24, ignore_eos=True))


def test_the_drafts_of_a_model_that_would_answer_alike_are_all_accepted(checkpoint: Path, model: Mllama) -> None:
    drafter = DraftModel(MllamaForConditionalGeneration.from_pretrained(checkpoint))
    engine = speculative(model, drafter)
    output, counts = steps(engine, GREEDY_TEXT)
    assert answers(output) == answers(run(make_engine(model), GREEDY_TEXT)[0])
    assert counts == [6, 9, 9]
    assert engine.speculation.num_accepted == engine.speculation.num_proposed


def test_a_small_draft_model_changes_no_answer(
    model: Mllama, wanted: list[GenerationRequest], expected: list[Output]
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=model.info.vocab_size + 8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    engine = speculative(model, DraftModel(LlamaForCausalLM(config)))
    assert [answers(output) for output in run(engine, *wanted[:4])] == [answers(output) for output in expected[:4]]
    assert engine.speculation.num_proposed > 0


REPEATING = FakeModel({"hi": "abcdabcdabcdabcd."})


def test_drafts_are_accepted_up_to_the_first_that_is_not_drawn() -> None:
    engine = make_engine(REPEATING, speculation=True, clock=Clock())
    output, counts = steps(engine, request("hi"))
    # The first step of all reads the prompt and decodes; "abc" comes again with the seventh token.
    assert text(output) == "abcdabcdabcdabcd."
    assert counts == [2, 1, 1, 1, 1, 1, 5, 5, 1]
    assert (engine.speculation.num_proposed, engine.speculation.num_accepted) == (11, 8)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"max_new_tokens": 12}, "abcdabcdabcd"),
        ({"stop_strings": ("dabcda",)}, "abc"),
        ({"stop_token_ids": (ord("."),)}, "abcdabcdabcdabcd"),
    ],
)
def test_an_answer_ends_where_it_should_among_drafts_and_says_nothing_more(
    sampling: dict[str, Any], expected: str
) -> None:
    engine = make_engine(REPEATING, speculation=True, clock=Clock())
    output, counts = steps(engine, request("hi", **sampling))
    assert text(output) == expected
    assert finished(output).num_generated_tokens == sum(counts) == len(deltas(output))
    assert answers(output) == answers(run(make_engine(REPEATING), request("hi", **sampling))[0])


def test_what_a_constraint_forces_takes_one_step() -> None:
    model = FakeModel(max_model_len=256)
    engine = make_engine(model, speculation=True, clock=Clock())
    wanted = replace(request("?", temperature=1.0), constraint=Choice(("whatever", "not at")))
    output, counts = steps(engine, wanted)
    assert text(output) in {"whatever", "not at"}
    assert counts == [len(text(output))]
    assert engine.speculation.num_accepted == len(text(output)) - 2  # the first token, and the last


def test_a_full_batch_has_no_drafts() -> None:
    engine = make_engine(REPEATING, speculation=True, clock=Clock(), max_batch=9)
    run(engine, *[request("hi")] * 9)
    assert engine.speculation.num_proposed == 0


def test_drafts_stop_where_rows_cost_more_than_they_bring() -> None:
    """A row costs a second, a step next to nothing else, and text repeats itself; then rows cost nothing."""
    clock = Clock()
    seconds = [1.0]

    class Slow(FakeModel):
        def decode(
            self, token_ids: Sequence[int] | Tensor, kvs: Sequence[KeyValues], num_rows: Sequence[int] | None = None
        ) -> Tensor:
            clock.now += seconds[0] * len(token_ids) + 1e-3
            return super().decode(token_ids, kvs, num_rows)

    model = Slow({"hi": "abcd" * 40}, max_model_len=256)
    engine = make_engine(model, speculation=True, clock=clock)
    _, counts = steps(engine, request("hi", max_new_tokens=150))
    assert sum(count > 2 for count in counts) <= 3
    assert engine.speculation.num_proposed < 30
    seconds[0] = 0.0
    run(engine, *[request("hi", max_new_tokens=150)] * 2)
    _, counts = steps(engine, request("hi", max_new_tokens=150))
    assert len(counts) < 40


def test_nobody_is_preempted_for_drafts() -> None:
    # Two pages of each of 2 layers for both: the second request has none to spare for drafts of the first.
    size = prefill_scratch_bytes(REPEATING.info) + 8 * 16 * 8
    engine = make_engine(REPEATING, speculation=True, clock=Clock(), kv_cache_bytes=size)
    outputs = run(engine, request("hi"), request("hi", name="other"))
    assert [text(output) for output in outputs] == ["abcdabcdabcdabcd."] * 2
    assert engine.num_preemptions == 0


class Always:
    """Drafts the same token over and over."""

    def __init__(self, token: str) -> None:
        """Of one byte."""
        self._token_id = ord(token)

    def propose(self, texts: Sequence[Text], most: int) -> list[list[int]]:
        return [[self._token_id] * most for _ in texts]

    def forget(self, sequence: int) -> None:
        """Nothing is kept."""


def test_a_sequence_whose_drafts_only_lacked_room_has_some_soon_after_there_is_room() -> None:
    speculation = Speculation(Always("a"), max_batch=10)
    # What it knows of sequences: nine of them leave room for one draft.
    batch: list[Any] = [
        SimpleNamespace(number=number, prompt_token_ids=(1,), generated_token_ids=(1,), max_new_tokens=2000)
        for number in range(9)
    ]

    def drafts(num_tokens: int, batch: list[Any]) -> dict[int, tuple[int, ...]]:
        for sequence in batch:
            sequence.num_generated_tokens = num_tokens
        return speculation.drafts(batch)

    assert all(len(drafts(count, batch)) == 1 for count in range(1, 1000))
    assert any(drafts(count, batch[:1]) for count in range(1000, 1040))


def test_a_constraint_knows_the_length_of_an_answer_with_its_drafts() -> None:
    model, clock = FakeModel({"?": "aaaaa"}), Clock()
    engine = Engine(model, LocalExecutor(model, clock=clock), EngineConfig(), clock=clock, drafter=Always("a"))
    wanted = replace(request("?", min_new_tokens=4), constraint=Regex("a*"))
    output, counts = steps(engine, wanted)
    assert (text(output), finished(output).matched_stop) == ("aaaaa", END)
    assert counts == [6]


def test_a_failure_behind_drafts_counts_only_where_they_are_drawn() -> None:
    class Broken(FakeModel):
        """Its logits are NaN behind an exclamation mark."""

        def _logits(self, history: list[int], text: str) -> Tensor:
            if text.endswith("!"):
                return torch.full((257,), torch.nan)
            return super()._logits(history, text)

    model = Broken({"hi": "yes", "ho": "no!"})
    clock = Clock()
    engine = Engine(model, LocalExecutor(model, clock=clock), EngineConfig(), clock=clock, drafter=Always("!"))
    fine, broken = run(engine, request("hi"), request("ho"))
    assert text(fine) == "yes"
    assert isinstance(broken[-1], RequestFailed)
    assert text(broken) == "no!"
