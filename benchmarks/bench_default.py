"""Which way of trimming is best for every kind of picture.

    python -m benchmarks.bench_default [--questions 600] [--model DIR] [--out FILE]

Candidates hold equally many rows, merged ones counted. At each budget the one is taken whose worst kind of picture
loses least, on questions drawn with another seed than those that it is then measured on; beside it stand the paper's
rule, which drops, and both controls. No times are measured: a busy machine does no harm.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np

from benchmarks.report import command_line, finish, markdown, points
from training.examples import PICTURES
from training.heldout import held_out
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.curve import measure_curve
from trimserve.evaluation.dataset import ALL_KINDS, Question, describe_questions
from trimserve.evaluation.in_process import InProcess
from trimserve.evaluation.report import Row, variant
from trimserve.model.loading import load_model

__all__ = ["Candidate", "best", "main", "table"]

_ROWS: Final = (0.22, 0.33, 0.5)
"""Rows held, as shares of an image's features."""
_SEED = 3  # of the questions to choose by; those of the comparison have 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way of trimming, but for its budget."""

    policy: str
    merge_ratio: float = 0.0
    parameters: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Policy, parameters and merging, for reports."""
        merged = f", merge_ratio {self.merge_ratio:g}" if self.merge_ratio else ""
        return variant(self.policy, self.parameters) + merged

    def holding(self, rows: float) -> TrimRequest:
        """Keep so many features that they and the merged rows come to a share of the image."""
        budget = FixedRatio(round((rows - self.merge_ratio) / (1 - self.merge_ratio), 4))
        return TrimRequest(policy=self.policy, merge_ratio=self.merge_ratio, parameters=self.parameters, budget=budget)


_PUBLISHED: Final = Candidate("trimmed")
_CONTROLS: Final = (Candidate("random", 0.1), Candidate("strided", 0.1))
_CANDIDATES: Final = (
    _PUBLISHED,
    *(Candidate("trimmed", merge_ratio) for merge_ratio in (0.05, 0.1, 0.15)),
    *(Candidate("cls", merge_ratio) for merge_ratio in (0.05, 0.1, 0.15)),
    Candidate("mmr", 0.1),
    Candidate("sparsevlm", 0.0, {"recycle_ratio": 1.0}),
    Candidate("visiondrop"),
    *_CONTROLS,
)
"""What is tried. The slow policies that choose before the decoder are not: docs/policies.md."""


def _measure(model: InProcess, num_questions: int) -> dict[str, Any]:
    with held_out(num_questions, PICTURES, _SEED) as own, held_out(num_questions, PICTURES) as questions:
        tried = list(_tried(model, own, _CANDIDATES))
        chosen = {rows: best([each for each in tried if each["rows"] == rows]) for rows in _ROWS}
        shown = {_PUBLISHED.name, *chosen.values(), *(control.name for control in _CONTROLS)}
        return {
            "chosen_by": describe_questions(own),
            "data": describe_questions(questions),
            "chosen": [{"rows": rows, "name": name} for rows, name in chosen.items()],
            "tried": tried,
            "measured": list(_tried(model, questions, [each for each in _CANDIDATES if each.name in shown])),
        }


def best(tried: Sequence[dict[str, Any]]) -> str:
    """The name of the candidate whose worst kind loses least; of equal ones the first."""
    found: str = max(tried, key=lambda each: min(change["value"] for change in each["changes"].values()))["name"]
    return found


def _tried(
    model: InProcess, questions: Sequence[Question], candidates: Sequence[Candidate]
) -> Iterator[dict[str, Any]]:
    """Changes from untrimmed by kind of picture, for each candidate and budget."""
    settings = [(candidate, rows) for candidate in candidates for rows in _ROWS]
    report = measure_curve(model, questions, [candidate.holding(rows) for candidate, rows in settings])
    num_kinds = len(report.rows) // (len(settings) + 1)
    for index, (candidate, rows) in enumerate(settings, start=1):
        of_setting: Sequence[Row] = report.rows[index * num_kinds : (index + 1) * num_kinds]
        changes = {row.kind: asdict(row.accuracy_change) for row in of_setting if row.kind != ALL_KINDS}
        held = float(np.mean([row.kept_fraction for row in of_setting if row.kind == ALL_KINDS]))
        yield {"name": candidate.name, "rows": rows, "held": round(held, 4), "changes": changes}


def table(report: dict[str, Any]) -> str:
    """What the chosen, the published and the blind ways lose by kind of picture, as Markdown."""
    chosen = {(each["rows"], each["name"]) for each in report["chosen"]}
    names = {name for _, name in chosen}
    kinds = list(report["measured"][0]["changes"])
    rows = []
    for each in sorted(report["measured"], key=lambda each: float(each["rows"])):
        is_chosen = (each["rows"], each["name"]) in chosen
        if is_chosen or each["name"] not in names:
            shown = f"**{each['name']}**" if is_chosen else each["name"]
            changes = (points(**each["changes"][kind]) for kind in kinds)
            rows.append([f"{each['rows']:.0%}", shown, f"{each['held']:.0%}", *changes])
    asked = f"{report['data']['num_questions']:,} questions, others than those it was chosen by; points from untrimmed."
    return f"{markdown(['rows', 'way', 'holds', *kinds], rows, words=2)}\n\n{asked}"


def main() -> None:
    """Try, choose, measure, write."""
    arguments = command_line(__doc__, "pictures/default.json", questions=600, model=None)
    model = InProcess(load_model(ModelConfig(model=arguments.model, dtype="float32"), EngineConfig()))
    found = _measure(model, arguments.questions)
    print(table(finish(arguments, {"model": model.describe(), **found})))


if __name__ == "__main__":
    main()
