"""Compiled constraints: from a request's constraint to llguidance's matcher, and a cache of those.

llguidance's own limits, and bounds on what is sent, keep compiling to a second or two at worst, and to milliseconds as
a rule. It knows no sequence; `guide.py` follows one.
"""

import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from tokenizers import Tokenizer

from trimserve.api.constraint import (
    MAX_EXPRESSION_BYTES,
    Choice,
    Constraint,
    JsonObject,
    JsonSchema,
    LarkGrammar,
    Regex,
)
from trimserve.api.info import ModelInfo
from trimserve.errors import InvalidRequest

__all__ = ["Grammars", "refusal"]

log = logging.getLogger(__name__)

_CACHE_BYTES: Final = 4 * 2**20
"""Of the constraints' text; what is compiled is some tens of times larger."""

_LEAST_BYTES: Final = 256
"""That a constraint counts, however short."""

_MAX_WORDS: Final = 1000
"""Characters of llguidance's that are repeated."""

_POINTER: Final = re.compile(r"(?<=regex parse error):\n.*\nerror(?=: )", re.DOTALL)
"""The lines in which Rust points at a place of an expression."""

_EXCERPT: Final = re.compile(r"\Aat \d+\(\d+\): (failed to compile JSON schema: )?|\n +1 \| .*", re.DOTALL)

_NO_TOKEN: Final = "no token satisfies it"

_REASONS: Final = {"NoExtension": _NO_TOKEN, "NoExtensionBias": _NO_TOKEN}
"""What llguidance's names for the end of a matcher mean, where it has no other words for an error."""

_WHITESPACE: Final = r"[ \n\r\t]{0,32}"
"""Between tokens of JSON: room for indented documents, and an end to a model that writes nothing else."""

_NO_FORCING: Final = '%llguidance {"no_forcing": true}\n'
"""Else text that can only go on in one way is tokenised as a raw prompt is, and `<|eot_id|>` typed by a user
becomes the special token."""


class Grammars:
    """Compiles constraints for one model; any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, info: ModelInfo) -> None:
        """Compile nothing yet.

        Args:
            tokenizer: of the model.
            info: of the model.
        """
        self._hf_tokenizer = tokenizer
        self._info = info
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._cache: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._used_bytes = 0

    @property
    def tokenizer(self) -> LLTokenizer:
        """The vocabulary as llguidance has it; takes seconds to make for 128,000 tokens, once.

        Raises:
            ValueError: llguidance cannot use the model's tokenizer.
        """
        with self._lock:
            if self._tokenizer is None:
                ends = self._info.generation_defaults.eos_token_ids
                self._tokenizer = LLTokenizer(self._hf_tokenizer.to_str(), eos_token=[*ends] or None)
            return self._tokenizer

    def warm_up(self) -> None:
        """Make the tokenizer now: it keeps the interpreter to itself while it is made, when nobody should wait."""
        try:
            _ = self.tokenizer
        except ValueError as error:
            log.warning("constraints will be refused: llguidance cannot use the tokenizer: %s", error)

    def matcher(self, constraint: Constraint) -> LLMatcher:
        """A matcher at its beginning, which belongs to the caller.

        Args:
            constraint: what it will match.
        Raises:
            InvalidRequest: it cannot be compiled, is too large, or no token satisfies it.
        """
        with self._lock:
            known = self._cache.get(constraint)
            if known is not None:
                self._cache.move_to_end(constraint)
                return known.deep_copy()
        compiled = self._compile(constraint)
        with self._lock:
            if constraint not in self._cache:  # another thread may have been faster
                self._cache[constraint] = compiled
                self._used_bytes += _num_bytes(constraint)
            while self._used_bytes > _CACHE_BYTES:
                oldest, _ = self._cache.popitem(last=False)
                self._used_bytes -= _num_bytes(oldest)
            return compiled.deep_copy()

    def _compile(self, constraint: Constraint) -> LLMatcher:
        try:
            grammar, tokenizer = _grammar(constraint), self.tokenizer
        except RecursionError:
            raise refusal(constraint, "schema is nested too deeply") from None
        except ValueError as error:
            raise refusal(constraint, str(error)) from error
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        can_begin = not matcher.is_error() and any(matcher.compute_bitmask())
        if matcher.is_error():
            raise refusal(constraint, matcher.get_error())
        if not can_begin:
            raise refusal(constraint, _NO_TOKEN)
        return matcher


def refusal(constraint: Constraint, words: str) -> InvalidRequest:
    """What a client is told of a constraint that llguidance cannot follow.

    Args:
        constraint: of the request.
        words: llguidance's.
    """
    words = words.removesuffix("<non-verbose/>").strip()
    words = _REASONS.get(words, words)
    if not isinstance(constraint, LarkGrammar):  # the position, and the excerpt, are of what we made of it
        words = " ".join(_POINTER.sub("", _EXCERPT.sub("", words)).split())
    cut = words if len(words) <= _MAX_WORDS else f"{words[:_MAX_WORDS]}..."
    return InvalidRequest(constraint.field, f"cannot be followed: {cut}")


def _grammar(constraint: Constraint) -> str:
    """In llguidance's dialect of Lark.

    Raises:
        ValueError: a schema is not JSON.
    """
    match constraint:
        case JsonSchema(schema):
            # Parsed here: what follows a schema would be read as Lark.
            return _json_grammar(json.loads(schema, parse_constant=_no_constant))
        case JsonObject():
            return _json_grammar({"type": "object"})
        case Regex(pattern):
            return f"{_NO_FORCING}start: /{regex_to_lark(pattern, '')}/"
        case Choice(options):
            return f"{_NO_FORCING}start: {' | '.join(map(_lark_text, options))}"
        case LarkGrammar(grammar):
            return grammar


def _json_grammar(schema: object) -> str:
    if not isinstance(schema, dict | bool):
        raise ValueError(f"schema must be an object or boolean, got {json.dumps(schema)[:64]}")
    num_bytes = sum(len(pattern.encode(errors="replace")) for pattern in _patterns(schema))
    if num_bytes > MAX_EXPRESSION_BYTES:
        raise ValueError(f"patterns must have at most {MAX_EXPRESSION_BYTES} bytes in all, got {num_bytes}")
    if schema is not False:
        document = {} if schema is True else schema
        own = document.get("x-guidance", {})  # llguidance's options, which a schema may carry
        if not isinstance(own, dict):
            raise ValueError(f"x-guidance must be an object, got {json.dumps(own)[:64]}")
        schema = {**document, "x-guidance": {"whitespace_pattern": _WHITESPACE, **own}}
    return f"{_NO_FORCING}start: %json {json.dumps(schema)}"


def _patterns(schema: object) -> Iterator[str]:
    todo = [schema]
    while todo:
        match todo.pop():
            case dict() as document:
                todo += document.values()
                if isinstance(pattern := document.get("pattern"), str):
                    yield pattern
                if isinstance(properties := document.get("patternProperties"), dict):
                    yield from properties
            case list() as items:
                todo += items


def _no_constant(name: str) -> object:
    raise ValueError(f"schema must be JSON, got {name}")


def _lark_text(option: str) -> str:
    return json.dumps(option)  # ASCII: Lark takes some characters in text as escapes only


def _num_bytes(constraint: Constraint) -> int:
    match constraint:
        case JsonSchema(text) | Regex(text) | LarkGrammar(text):
            return max(_LEAST_BYTES, len(text.encode()))
        case Choice(options):
            return max(_LEAST_BYTES, sum(len(option.encode()) for option in options))
        case JsonObject():
            return _LEAST_BYTES
