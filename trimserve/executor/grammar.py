"""Compiled constraints: from a request's constraint to llguidance's matcher, and a cache of those.

Compiling is bounded by llguidance's own limits, so it ends within a fraction of a second whatever is sent. It knows no
sequence; `guide.py` follows one.
"""

import json
import logging
import threading
from collections import OrderedDict
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from trimserve.api.constraint import Choice, Constraint, JsonObject, JsonSchema, LarkGrammar, Regex
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

_WHITESPACE: Final = r"[ \n\r\t]{0,32}"
"""Between tokens of JSON: room for indented documents, and an end to a model that writes nothing else."""


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
            raise refusal(constraint, "no token satisfies it")
        return matcher


def refusal(constraint: Constraint, words: str) -> InvalidRequest:
    """What a client is told of a constraint that llguidance cannot follow.

    Args:
        constraint: of the request.
        words: llguidance's.
    """
    words = words.removesuffix("<non-verbose/>").strip()
    cut = words if len(words) <= _MAX_WORDS else f"{words[:_MAX_WORDS]}..."
    return InvalidRequest(constraint.field, f"cannot be followed: {cut}")


def _grammar(constraint: Constraint) -> str:
    """In llguidance's own form.

    Raises:
        ValueError: a schema is not JSON.
    """
    match constraint:
        case JsonSchema(schema):
            # Parsed here: llguidance would take text that goes on behind the schema for a part of its own form.
            return _json_grammar(json.loads(schema, parse_constant=_no_constant))
        case JsonObject():
            return _json_grammar({"type": "object"})
        case Regex(pattern):
            return LLMatcher.grammar_from_regex(pattern)
        case Choice(options):
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_lark_text, options)))
        case LarkGrammar(grammar):
            return LLMatcher.grammar_from_lark(grammar)


def _json_grammar(schema: object) -> str:
    if not isinstance(schema, dict | bool):
        raise ValueError(f"schema must be an object or boolean, got {json.dumps(schema)[:64]}")
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_pattern": _WHITESPACE})


def _no_constant(name: str) -> object:
    raise ValueError(f"schema must be JSON, got {name}")


def _lark_text(option: str) -> str:
    return json.dumps(option, ensure_ascii=False)


def _num_bytes(constraint: Constraint) -> int:
    match constraint:
        case JsonSchema(text) | Regex(text) | LarkGrammar(text):
            return max(_LEAST_BYTES, len(text.encode()))
        case Choice(options):
            return max(_LEAST_BYTES, sum(len(option.encode()) for option in options))
        case JsonObject():
            return _LEAST_BYTES
