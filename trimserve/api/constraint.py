"""What form an answer must have; at most one for a request.

Checked here: sizes. Whether it is valid, the grammar's compiler says (`executor/grammar.py`).
"""

from dataclasses import dataclass
from typing import ClassVar, Final

__all__ = [
    "MAX_CHOICES",
    "MAX_CONSTRAINT_BYTES",
    "MAX_EXPRESSION_BYTES",
    "Choice",
    "Constraint",
    "JsonObject",
    "JsonSchema",
    "LarkGrammar",
    "Regex",
]

MAX_CONSTRAINT_BYTES: Final = 65_536
"""Of a schema, or all choices together, as UTF-8."""

MAX_EXPRESSION_BYTES: Final = 8192
"""Of a regular expression, a grammar, or all patterns of a schema together: the time to compile one grows with its
square, to a second or two."""

MAX_CHOICES: Final = 1024


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """The answer is JSON that is valid against a schema."""

    schema: str
    """As JSON."""
    field: ClassVar[str] = "json_schema"


@dataclass(frozen=True, slots=True)
class JsonObject:
    """The answer is any JSON object."""

    field: ClassVar[str] = "json_object"


@dataclass(frozen=True, slots=True)
class Regex:
    """A regular expression matches the whole answer."""

    pattern: str
    field: ClassVar[str] = "regex"


@dataclass(frozen=True, slots=True)
class Choice:
    """The answer is one of these texts."""

    options: tuple[str, ...]
    field: ClassVar[str] = "choice"


@dataclass(frozen=True, slots=True)
class LarkGrammar:
    """The answer is a sentence of a context-free grammar."""

    grammar: str
    """As llguidance's dialect of Lark has it."""
    field: ClassVar[str] = "grammar"


Constraint = JsonSchema | JsonObject | Regex | Choice | LarkGrammar
"""`field` names where a request has it."""
