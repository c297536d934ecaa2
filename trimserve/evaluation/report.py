"""What an evaluation found: one row for each policy, budget and kind of question, and how it came about.

Made of plain data, written as JSON, read back as the same objects.
"""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trimserve import __version__
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.evaluation.answers import Answer
from trimserve.evaluation.dataset import ALL_KINDS, Question
from trimserve.evaluation.metrics import Bootstrap, Estimate, is_match

__all__ = [
    "UNTRIMMED_POLICY",
    "Advantage",
    "Report",
    "Row",
    "about_this_run",
    "bootstrap_of",
    "is_right",
    "make_report",
    "variant",
    "where_by_kind",
]

UNTRIMMED_POLICY = "untrimmed"
"""Name of the row that everything is compared with."""


@dataclass(frozen=True, slots=True)
class Row:
    """One policy at one budget, over one kind of question."""

    policy: str
    k_ratio: float
    """Budget per head where `keep` is None; 1 where nothing is trimmed and for a policy that takes no budget."""
    merge_ratio: float
    kind: str
    """`all`: every question."""
    num_questions: int
    kept_fraction: float
    """Mean over the questions of rows held, kept features and merged ones, by valid features."""
    accuracy: Estimate
    """Share of exact matches."""
    accuracy_change: Estimate
    """Accuracy minus that of the untrimmed answers to the same questions."""
    divergence: Estimate
    """Mean KL(untrimmed || this) of the first generated token's distribution, in nats."""
    keep: float | None = None
    """Budget of the whole image: the share of its features that stays."""
    parameters: dict[str, float] = field(default_factory=dict)
    """Of the policy; those that are not there have its defaults."""

    @property
    def name(self) -> str:
        """The policy with its parameters."""
        return variant(self.policy, self.parameters)


@dataclass(frozen=True, slots=True)
class Advantage:
    """How much better the first policy answers than another one that keeps as many features of every image."""

    policy: str
    over: str
    k_ratio: float
    merge_ratio: float
    kind: str
    kept_fraction: float
    accuracy: Estimate
    """Difference of the two accuracies over the same questions."""
    keep: float | None = None
    """See `Row.keep`."""
    parameters: dict[str, float] = field(default_factory=dict)
    """Of the other policy; the first has its defaults."""

    @property
    def name(self) -> str:
        """The other policy with its parameters."""
        return variant(self.over, self.parameters)


@dataclass(frozen=True, slots=True)
class Report:
    """A whole evaluation."""

    run: dict[str, Any]
    """Machine, versions, commit and speed."""
    model: dict[str, Any]
    """Which model answered, and through what."""
    data: dict[str, Any]
    """See `describe_questions`."""
    rows: tuple[Row, ...]
    advantages: tuple[Advantage, ...]

    def to_json(self) -> str:
        """The report as a JSON document, a row on each line; what `from_json` takes."""
        document = asdict(self)
        lists = {name: document.pop(name) for name in ("rows", "advantages")}
        parts = [f'"{name}": {json.dumps(value, indent=2)}' for name, value in document.items()]
        for name, rows in lists.items():
            lines = ",\n".join(json.dumps(row) for row in rows)
            parts.append(f'"{name}": [\n{lines}\n]')
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def compared(self, merge_ratio: float) -> list[Row]:
        """Rows over all questions at one merge_ratio, but not of policies that merge by rules of their own.

        Args:
            merge_ratio: of the rows; 0 gives those of all policies.
        """
        rows = [row for row in self.rows if row.kind == ALL_KINDS and row.policy != UNTRIMMED_POLICY]
        dropped = {(row.name, row.k_ratio, row.keep): row.kept_fraction for row in rows if not row.merge_ratio}
        return [
            row
            for row in rows
            if row.merge_ratio == merge_ratio
            and not (merge_ratio and dropped.get((row.name, row.k_ratio, row.keep)) == row.kept_fraction)
        ]

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read `to_json` back."""
        document = json.loads(text)
        rows = tuple(
            Row(**row | {name: Estimate(**row[name]) for name in ("accuracy", "accuracy_change", "divergence")})
            for row in document.pop("rows")
        )
        advantages = tuple(
            Advantage(**advantage | {"accuracy": Estimate(**advantage["accuracy"])})
            for advantage in document.pop("advantages")
        )
        return cls(**document, rows=rows, advantages=advantages)


def variant(policy: str, parameters: Mapping[str, float]) -> str:
    """A policy with parameters as `--policies` takes it.

    >>> variant("vispruner", {"layer": 2, "important_ratio": 0.25})
    'vispruner:layer=2:important_ratio=0.25'
    """
    return ":".join([policy, *(f"{name}={value:g}" for name, value in parameters.items())])


def make_report(
    questions: Sequence[Question],
    answers: Sequence[Sequence[Answer]],
    trims: Sequence[TrimRequest],
    *,
    run: dict[str, Any],
    model: dict[str, Any],
    data: dict[str, Any],
) -> Report:
    """Sum answers up.

    Args:
        questions: with what is right.
        answers: for each question the untrimmed answer, then one for each of `trims`.
        trims: policies and budgets; the first policy's advantage over the others is told where it had their budget.
        run: see `Report`.
        model: see `Report`.
        data: see `Report`.
    """
    table = _Table(questions, answers)
    settings = [
        _Setting(UNTRIMMED_POLICY, 1.0, 0.0),
        *(_Setting(trim.policy, trim.k_ratio, trim.merge_ratio, _keep(trim), dict(trim.parameters)) for trim in trims),
    ]
    rows = [table.row(column, setting, kind) for column, setting in enumerate(settings) for kind in table.kinds]
    first = trims[0].policy
    advantages = [
        table.advantage(settings.index(rival), first, column, setting, kind)
        for column, setting in enumerate(settings)
        if column and setting.policy != first and (rival := setting._replace(policy=first, parameters={})) in settings
        for kind in table.kinds
    ]
    return Report(run, model, data, tuple(rows), tuple(advantages))


def about_this_run(seconds: float, num_answers: int) -> dict[str, Any]:
    """Machine, versions, commit and speed.

    Args:
        seconds: wall time of the answers.
        num_answers: those that were generated.
    """
    packages = ("torch", "transformers", "tokenizers", "numpy", "pillow")
    return {
        "machine": {
            "system": platform.system(),
            "cpu": _cpu(),
            "num_cpus": os.cpu_count(),
            "simd": torch.backends.cpu.get_cpu_capability(),
            "num_threads": torch.get_num_threads(),
        },
        "versions": {
            "trimserve": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "commit": _commit(),
        "seconds": round(seconds, 1),
        "answers_per_second": round(num_answers / seconds, 1),
    }


class _Setting(NamedTuple):
    """What a row is about, but for the kind of question."""

    policy: str
    k_ratio: float
    merge_ratio: float
    keep: float | None = None
    parameters: dict[str, float] = {}  # noqa: RUF012 - nobody changes it


def is_right(questions: Sequence[Question], answers: Sequence[Answer]) -> NDArray[np.float64]:
    """1 for each question that is answered rightly, else 0: [Q]."""
    pairs = zip(questions, answers, strict=True)
    return np.array([is_match(answer.text, question.answer or "") for question, answer in pairs], np.float64)


def bootstrap_of(questions: Sequence[Question]) -> Bootstrap:
    """Intervals over the images that questions are about."""
    numbers = {image: number for number, image in enumerate(dict.fromkeys(q.image for q in questions))}
    return Bootstrap(np.array([numbers[question.image] for question in questions]))


def where_by_kind(questions: Sequence[Question]) -> dict[str, NDArray[np.bool_]]:
    """A mask [Q] for all questions, as `ALL_KINDS`, then one for each kind."""
    kinds = np.array([question.kind for question in questions])
    where = {ALL_KINDS: np.ones(len(questions), dtype=np.bool_)}
    return where | {str(kind): kinds == kind for kind in np.unique(kinds) if kind}


class _Table:
    """Figures of every question under every setting; column 0 is untrimmed."""

    def __init__(self, questions: Sequence[Question], answers: Sequence[Sequence[Answer]]) -> None:
        self._is_right = np.stack([is_right(questions, column) for column in zip(*answers, strict=True)], axis=1)
        self._kept = np.array([[answer.num_held / answer.num_valid for answer in row] for row in answers])
        self._divergence = np.array([[answer.divergence for answer in row] for row in answers])
        self._bootstrap = bootstrap_of(questions)
        self._where = where_by_kind(questions)

    @property
    def kinds(self) -> list[str]:
        """All kinds of questions, and each of them."""
        return list(self._where)

    def row(self, column: int, setting: _Setting, kind: str) -> Row:
        """What a setting achieves on a kind."""
        where, is_right = self._where[kind], self._is_right[:, column]
        return Row(
            **setting._asdict(),
            kind=kind,
            num_questions=int(where.sum()),
            kept_fraction=self._kept_fraction(column, kind),
            accuracy=self._bootstrap.mean(is_right, where),
            accuracy_change=self._bootstrap.mean(is_right - self._is_right[:, 0], where),
            divergence=self._bootstrap.mean(self._divergence[:, column], where),
        )

    def advantage(self, column: int, policy: str, other: int, over: _Setting, kind: str) -> Advantage:
        """What a policy gains over another setting on a kind."""
        gain = self._is_right[:, column] - self._is_right[:, other]
        return Advantage(
            policy=policy,
            over=over.policy,
            k_ratio=over.k_ratio,
            merge_ratio=over.merge_ratio,
            keep=over.keep,
            parameters=over.parameters,
            kind=kind,
            kept_fraction=self._kept_fraction(column, kind),
            accuracy=self._bootstrap.mean(gain, self._where[kind]),
        )

    def _kept_fraction(self, column: int, kind: str) -> float:
        return float(self._kept[self._where[kind], column].mean())


def _keep(trim: TrimRequest) -> float | None:
    return trim.budget.ratio if isinstance(trim.budget, FixedRatio) else None


def _cpu() -> str:
    text = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    models = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this file belongs to; None for an installed package."""

    def git(*arguments: str) -> str:
        """What git prints, without white space around it."""
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    # An installed package may lie within somebody else's checkout, such as in its .venv.
    is_checkout = shutil.which("git") is not None and git("ls-files", __file__)
    return git("rev-parse", "HEAD") if is_checkout else None
