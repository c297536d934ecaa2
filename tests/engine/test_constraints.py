"""Answers have the form that their requests ask for, whatever the model would rather say."""

import json
import re
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from tests.engine.fake_model import END, FakeModel, request
from tests.engine.stepping import Output, deltas, finished, make_engine, run, start, text
from tests.executor.executors import PicklingExecutor
from trimserve.api.chunks import FinishReason
from trimserve.api.constraint import Choice, Constraint, JsonObject, JsonSchema, LarkGrammar, Regex
from trimserve.api.request import GenerationRequest
from trimserve.config import EngineConfig
from trimserve.engine.engine import Engine
from trimserve.errors import InvalidRequest
from trimserve.executor.local import LocalExecutor

PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 150}, "name": {"enum": ["Ada", "Bob"]}},
    "required": ["age", "name"],
    "additionalProperties": False,
}


def constrained(constraint: Constraint, prompt: str = "?", **sampling: Any) -> GenerationRequest:
    """A request that is sampled at random, and has room for an answer."""
    params: dict[str, Any] = {"max_new_tokens": 100, "temperature": 1.0, **sampling}
    return replace(request(prompt, **params), constraint=constraint)


def answer(wanted: GenerationRequest, model: FakeModel | None = None) -> Output:
    """What an engine of its own makes of it."""
    [output] = run(make_engine(model or FakeModel()), wanted)
    return output


@pytest.mark.parametrize("seed", range(10))
def test_an_answer_is_valid_against_its_schema(seed: int) -> None:
    output = answer(constrained(JsonSchema(json.dumps(PERSON)), seed=seed, max_new_tokens=120))
    assert finished(output).reason is FinishReason.STOP
    jsonschema.validate(json.loads(text(output)), PERSON)


@pytest.mark.parametrize("seed", range(10))
def test_a_regular_expression_matches_the_whole_answer(seed: int) -> None:
    output = answer(constrained(Regex("[ab]{2}-[0-9]{1,3}(x|yz)"), seed=seed))
    assert re.fullmatch("[ab]{2}-[0-9]{1,3}(x|yz)", text(output))
    assert finished(output).reason is FinishReason.STOP


@pytest.mark.parametrize(
    "option", ['say "so"', "back\\slash", "new\nline", "ünï 😀", "<|end|>", "/x/", "a | b", "[0-9]", "\x7f\0\x85"]
)
def test_a_choice_is_text_and_not_syntax(option: str) -> None:
    assert text(answer(constrained(Choice((option,))))) == option


def test_the_model_chooses_among_the_options() -> None:
    texts = {text(answer(constrained(Choice(("yes", "no", "perhaps")), seed=seed))) for seed in range(30)}
    assert texts == {"yes", "no", "perhaps"}


def test_any_object_is_an_object() -> None:
    model = FakeModel({"?": '{"colour": ["red", {"a": null}]}'})
    assert text(answer(constrained(JsonObject(), temperature=0.0), model)) == '{"colour": ["red", {"a": null}]}'


def test_a_grammar_may_nest() -> None:
    grammar = LarkGrammar('start: sum\nsum: num | "(" sum "+" sum ")"\nnum: /[0-9]/')
    output = answer(constrained(grammar, temperature=0.0), FakeModel({"?": "((1+2)+3)"}))
    assert text(output) == "((1+2)+3)"
    assert finished(output).reason is FinishReason.STOP


def test_a_complete_answer_ends_without_an_end_token() -> None:
    output = answer(constrained(Choice(("yes",)), temperature=0.0))
    assert [delta.token_ids for delta in deltas(output)] == [(ord("y"),), (ord("e"),), (ord("s"),)]
    assert (finished(output).reason, finished(output).matched_stop) == (FinishReason.STOP, None)


@pytest.mark.parametrize("sampling", [{"min_new_tokens": 50}, {"ignore_eos": True}])
def test_a_complete_answer_ends_whatever_else_is_asked(sampling: dict[str, Any]) -> None:
    assert text(answer(constrained(Choice(("yes",)), **sampling))) == "yes"


def test_an_answer_ends_where_it_may_when_the_model_wants_it() -> None:
    model = FakeModel({"?": "aa"})
    output = answer(constrained(Regex("a*"), temperature=0.0), model)
    assert (text(output), finished(output).matched_stop) == ("aa", END)


@pytest.mark.parametrize("sampling", [{"min_new_tokens": 5}, {"ignore_eos": True, "max_new_tokens": 5}])
def test_an_answer_that_may_go_on_heeds_how_long_it_should_be(sampling: dict[str, Any]) -> None:
    output = answer(constrained(Regex("a*"), temperature=0.0, **sampling), FakeModel({"?": "aa" + "a" * 3}))
    assert text(output) == "aaaaa"


@pytest.mark.parametrize("sampling", [{}, {"ignore_eos": True}, {"min_new_tokens": 3}])
def test_an_answer_that_may_only_be_empty_is(sampling: dict[str, Any]) -> None:
    output = answer(constrained(Regex("(x?){0}"), **sampling))
    assert (text(output), finished(output).reason) == ("", FinishReason.STOP)


def test_an_end_token_cannot_break_the_form() -> None:
    # The model would end at once.
    assert text(answer(constrained(Choice(("yes",)), temperature=0.0), FakeModel({"?": (END,) * 4}))) == "yes"


def test_a_stop_token_that_the_form_needs_is_not_withheld_where_nothing_else_fits() -> None:
    output = answer(constrained(Choice(("yes",)), stop_token_ids=(ord("e"),), min_new_tokens=9))
    assert finished(output).matched_stop == ord("e")


def test_stop_strings_end_an_answer_within_its_form() -> None:
    output = answer(constrained(Choice(("one two three",)), stop_strings=("two",)))
    assert (text(output), finished(output).matched_stop) == ("one ", "two")


def test_logprobs_are_the_models_own_and_bias_cannot_break_the_form() -> None:
    bias = {ord("n"): 100.0, ord("q"): 100.0}
    wanted = constrained(Choice(("yes", "no")), temperature=0.0, logit_bias=bias, num_top_logprobs=1)
    output = answer(wanted, FakeModel({"?": "qqqq"}))
    assert text(output) == "no"
    [first, *_] = deltas(output)
    assert first.logprobs[0].top[0][0] == ord("q")
    assert first.logprobs[0].logprob < -10


def test_each_request_of_a_batch_has_its_own_form_and_the_same_answer_as_alone() -> None:
    wanted = [
        constrained(Choice(("yes", "no")), "a", seed=1),
        request("b", temperature=1.0, seed=2, max_new_tokens=30),
        constrained(Regex("[0-9]{8}"), "c", seed=3),
        constrained(JsonSchema(json.dumps(PERSON)), "d", seed=4, repetition_penalty=1.1),
    ]
    together = [text(output) for output in run(make_engine(FakeModel(), max_batch=4), *wanted)]
    assert together == [text(answer(one)) for one in wanted]


def test_a_sequence_that_was_dropped_goes_on_within_its_form_over_a_pipe() -> None:
    wanted = constrained(JsonSchema(json.dumps(PERSON)), seed=5, max_new_tokens=120)
    model = FakeModel()
    engine = Engine(model, PicklingExecutor(LocalExecutor(model)), EngineConfig(max_batch=1))
    sequence, output = start(engine, wanted)
    has_dropped = False
    while engine.has_work:
        if not has_dropped and len(deltas(output)) >= 4:
            has_dropped = True
            engine.preempt(sequence)
        engine.step()
    assert has_dropped
    assert text(output) == text(answer(wanted))


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (JsonSchema('{"type": "nonsense"}'), "json_schema: cannot be followed: Invalid type: nonsense"),
        (JsonSchema('{"type": "integer", "minimum": 5, "maximum": 3}'), "json_schema: .*Unsatisfiable schema"),
        (JsonSchema('{"uniqueItems": true, "type": "array"}'), "json_schema: .*uniqueItems"),
        (JsonSchema("false"), "json_schema: .*schema is false"),
        (JsonSchema("[1]"), r"json_schema: .*schema must be an object or boolean, got \[1\]"),
        (JsonSchema('{"type": "string"}, {}'), "json_schema: .*Extra data"),
        (JsonSchema("{"), "json_schema: "),
        (JsonSchema('{"const": NaN}'), "json_schema: .*NaN"),
        (JsonSchema('{"x-guidance": [1]}'), r"json_schema: .*x-guidance must be an object, got \[1\]"),
        (JsonSchema('{"$ref": "#"}'), r"json_schema: cannot be followed: no token satisfies it\Z"),
        (Regex(r"[^\x00-\x{10FFFF}]"), r"regex: cannot be followed: no token satisfies it\Z"),
        (JsonSchema('{"items":' * 10_000), "json_schema: .*nested too deeply"),
        (Regex("(a"), r"regex: cannot be followed: invalid regex .*: regex parse error: unclosed group\Z"),
        (
            JsonSchema(json.dumps({"anyOf": [{"pattern": "a" * 5000}] * 2})),
            "json_schema: .*at most 8192 bytes in all, got 10000",
        ),
        (LarkGrammar("start: missing"), 'grammar: .*unknown name: "missing"'),
        (LarkGrammar('start: start "a"'), "grammar: "),
    ],
    ids=lambda value: "" if isinstance(value, str) else repr(value)[:40],
)
def test_what_cannot_be_followed_is_refused_with_the_field_and_the_reason(constraint: Constraint, words: str) -> None:
    engine = make_engine(FakeModel())
    with pytest.raises(InvalidRequest, match=f"(?s){words}") as refused:
        start(engine, constrained(constraint))
    assert len(refused.value.message) < 1200
    assert isinstance(constraint, LarkGrammar) or "\n" not in refused.value.message


@pytest.mark.parametrize("speculation", [False, True])
def test_an_answer_whose_constraint_cannot_be_followed_any_further_is_not_complete(speculation: bool) -> None:
    """What comes behind "a" has no end."""
    endless = LarkGrammar('start: "a" more\nmore: "b" more')
    [output] = run(make_engine(FakeModel(), speculation=speculation), constrained(endless))
    assert text(output) == "a"
    error = output[-1]
    assert isinstance(error, InvalidRequest)
    assert error.field == "grammar"
    assert "cannot be followed: parser error: Too many items" in error.message
