"""Ask the embedded model for answers to random schemas and regular expressions, and check them with other libraries.

    python -m scripts.verify.constraints [--schemas 1000] [--regexes 200] [--out FILE]

Answers are sampled at temperature 1, so that the model says what it would not: only the constraint holds them. Every
answer that ends by itself is checked with jsonschema or Python's `re`; some are asked for again as a stream.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
from jsonschema import Draft202012Validator

from benchmarks.machine import about
from benchmarks.report import write_json
from trimserve.client import Client, make_request
from trimserve.refusal import Refusal
from trimserve.serve import in_process_server
from trimserve.v1 import generation_pb2 as pb

__all__ = ["Tally", "ask_all", "main", "random_regex", "random_schema"]

_OUT = Path(__file__).parents[2] / "benchmarks/results/constraints_valid.json"
_NUM_CALLS: Final = 16
_MAX_NEW_TOKENS: Final = 400
_STREAMED: Final = 10
"""One in so many answers is asked for a second time, as a stream."""
_LEAST_ACCEPTED: Final = 0.9
_LEAST_ENDED: Final = 0.5


@dataclass
class Tally:
    """What became of the requests of one kind."""

    num_asked: int = 0
    num_accepted: int = 0
    num_ended: int = 0
    num_streamed: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Answers that break their constraint, or differ as a stream."""

    @property
    def is_good(self) -> bool:
        """Whether every answer is right, and there are enough of them."""
        enough = self.num_accepted >= _LEAST_ACCEPTED * self.num_asked
        return enough and self.num_ended >= _LEAST_ENDED * self.num_asked and not self.wrong


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A valid JSON Schema.

    Args:
        rng: draws it.
        depth: of the schema within others.
    """
    leaves = [_integer, _number, _string, _enumeration, _constant, _one_word]
    inner = [_array, _object, _object, _alternatives, _several_types]
    drawn = rng.choice(leaves if depth > 2 or (depth and rng.random() < 0.5) else [*leaves, *inner, *inner])(rng, depth)
    if rng.random() < 0.02:  # what llguidance has not
        drawn |= rng.choice([{"uniqueItems": True}, {"not": {"type": "null"}}, {"contains": {"type": "integer"}}])
    return drawn


def _integer(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    bounds = {"minimum": low, "exclusiveMinimum": low, "maximum": low + rng.randint(2, 5000)}
    return {"type": "integer", **{name: bounds[name] for name in rng.sample([*bounds], rng.randint(0, 2))}}


def _number(rng: random.Random, _: int) -> dict[str, Any]:
    low = round(rng.uniform(-100, 100), 2)
    return {"type": "number", "minimum": low, "maximum": round(low + rng.uniform(0.5, 50), 2)}


def _string(rng: random.Random, _: int) -> dict[str, Any]:
    least = rng.randint(0, 3)
    sizes: dict[str, Any] = {"minLength": least, "maxLength": least + rng.randint(0, 12)}
    return {"type": "string", **rng.choice([sizes, {"pattern": f"^{random_regex(rng)}$"}, {"maxLength": 20}])}


def _enumeration(rng: random.Random, _: int) -> dict[str, Any]:
    values = ["red", "green", 'a "word"', "ünï", 3, -7, 2.5, True, None, [1, 2], {"a": "b"}]
    return {"enum": rng.sample(values, rng.randint(1, 5))}


def _constant(rng: random.Random, _: int) -> dict[str, Any]:
    return {"const": rng.choice(["done", "", 0, False, None, [], {"a": [1]}, "\\ / \n"])}


def _one_word(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null"])}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    drawn = {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": least + rng.randint(0, 3)}
    if rng.random() < 0.3:
        return {"type": "array", "prefixItems": [random_schema(rng, depth + 1) for _ in range(2)], "items": False}
    return drawn | ({"minItems": least} if least else {})


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["name", "age", "colour", "a b", "x.y", "größe", "tags", "$id_", 'q"t'], rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": rng.choice([False, False, False, {"type": "integer"}]),
    }


def _alternatives(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"$defs": {"it": random_schema(rng, 3)}, "type": "array", "items": {"$ref": "#/$defs/it"}, "maxItems": 2}
    return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}


def _several_types(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": rng.sample(["integer", "boolean", "null"], 2)}


def random_regex(rng: random.Random) -> str:
    """A regular expression that means the same to Python and to Rust.

    Args:
        rng: draws it.
    """
    return "".join(_piece(rng, 0) for _ in range(rng.randint(1, 4)))


def _piece(rng: random.Random, depth: int) -> str:
    atoms = ["a", "Z", "[0-9]", "[a-f]", '[^a-z"\\\\\\x00-\\x1f]', "\\.", "-", "é", "[A-Za-z_]"]
    atom = rng.choice(atoms)
    if depth < 2 and rng.random() < 0.3:
        atom = f"({'|'.join(_piece(rng, depth + 1) for _ in range(rng.randint(1, 3)))})"
    return atom + rng.choice(["", "", "", "?", "{2}", "{1,3}", "{0,4}"])


def ask_all(
    client: Client, constraints: list[dict[str, Any]], is_right: Callable[[dict[str, Any], str], bool]
) -> Tally:
    """Ask for an answer of every form.

    Args:
        client: of a server with the embedded model.
        constraints: fields of requests.
        is_right: whether an answer keeps to its constraint.
    """
    tally = Tally(num_asked=len(constraints))
    with ThreadPoolExecutor(_NUM_CALLS) as threads:
        answers = threads.map(partial(_ask, client), range(len(constraints)), constraints)
        for number, (constraint, answer) in enumerate(zip(constraints, answers, strict=True)):
            if isinstance(answer, str):
                tally.refusals[re.sub(r'[\[("].*', "", answer).strip()] += 1
                continue
            tally.num_accepted += 1
            if answer.finish_reason == pb.FINISH_REASON_STOP:
                tally.num_ended += 1
                if not is_right(constraint, answer.text):
                    tally.wrong.append(f"{constraint}: {answer.text!r}")
            if number % _STREAMED == 0:
                tally.num_streamed += 1
                events = client.stream(_request(number, constraint))
                if (streamed := "".join(event.delta.text for event in events)) != answer.text:
                    tally.wrong.append(f"{constraint}: {answer.text!r}, as a stream {streamed!r}")
    return tally


def _request(number: int, constraint: dict[str, Any]) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(temperature=1.0, seed=number, max_new_tokens=_MAX_NEW_TOKENS)
    return make_request("Say something.", sampling=sampling, **constraint)


def _ask(client: Client, number: int, constraint: dict[str, Any]) -> pb.GenerateResponse | str:
    try:
        return client.generate(_request(number, constraint))
    except grpc.RpcError as error:
        refusal = Refusal.of(error)
        if refusal.code != "INVALID_ARGUMENT":
            raise
        return refusal.message


def is_valid(constraint: dict[str, Any], text: str) -> bool:
    """Whether an answer is JSON that jsonschema finds valid."""
    try:
        return Draft202012Validator(constraint["json_schema"]).is_valid(json.loads(text))
    except ValueError:
        return False


def matches(constraint: dict[str, Any], text: str) -> bool:
    """Whether Python's `re` matches the whole answer."""
    return re.fullmatch(constraint["regex"], text) is not None


def main() -> None:
    """Print and write what became of all requests; exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--regexes", type=int, default=200)
    parser.add_argument("--out", type=Path, default=_OUT)
    arguments = parser.parse_args()
    rng = random.Random(22)
    schemas = [random_schema(rng) for _ in range(arguments.schemas)]
    for schema in schemas:
        Draft202012Validator.check_schema(schema)
    regexes = [random_regex(rng) for _ in range(arguments.regexes)]
    with in_process_server() as server, Client(server.address) as client:
        tallies = {
            "schemas": ask_all(client, [{"json_schema": schema} for schema in schemas], is_valid),
            "regexes": ask_all(client, [{"regex": regex} for regex in regexes], matches),
        }
    report: dict[str, Any] = {"machine": about(1)}
    for name, tally in tallies.items():
        report[name] = {**vars(tally), "refusals": dict(tally.refusals), "wrong": tally.wrong[:10]}
    write_json(report, arguments.out)
    print(json.dumps(report, indent=2))
    sys.exit(not all(tally.is_good for tally in tallies.values()))


if __name__ == "__main__":
    main()
