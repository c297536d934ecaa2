"""What answers about harder pictures depend on, and which way of trimming is best for every kind of them.

    python -m benchmarks.bench_pictures [--subject backgrounds ...] [--questions N] [--model DIR] [--out DIR]

- `backgrounds`: the same questions about the same busy scenes on two photographs each, untrimmed: whether they are
  answered from what lies on the photograph, or from the photograph.
- `grey`: the same questions with a grey image, untrimmed: what the questions alone give away.
- `default`: candidates that hold equally many rows, merged ones counted. At each budget the one is taken whose worst
  kind of picture loses least, on questions drawn with another seed than those that it is then measured on; beside it
  stand the paper's rule, which drops, and both controls.

Each asks a number of questions of its own where none is given, the embedded model where no other is named. No times are
measured: a busy machine does no harm.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.held_out import bootstrap_of, held_out, is_right
from benchmarks.report import command_line, finish, markdown, points
from training.backgrounds import BACKGROUNDS, write_backgrounds
from training.examples import PICTURES
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.answers import Answer
from trimserve.evaluation.curve import measure_curve
from trimserve.evaluation.dataset import ALL_KINDS, Question, describe_questions, load_questions
from trimserve.evaluation.in_process import InProcess
from trimserve.evaluation.report import Row, variant
from trimserve.model.loading import load_model

__all__ = [
    "Candidate",
    "backgrounds",
    "backgrounds_table",
    "best",
    "default_table",
    "grey_table",
    "lost_without",
    "main",
]


def _by_kind(questions: Sequence[Question]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """All of them, then each kind: which questions are of it."""
    kinds = np.array([question.kind for question in questions])
    yield ALL_KINDS, np.ones(len(kinds), np.bool_)
    for kind in np.unique(kinds).tolist():
        yield kind, kinds == kind


def _backgrounds(model: InProcess, num_questions: int) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        files = write_backgrounds(Path(folder), num_questions)
        asked = [load_questions(files[background]) for background in BACKGROUNDS]
        answers = [[answer for [answer] in model.answers(questions, [])] for questions in asked]
        return {"data": describe_questions(asked[0]), **backgrounds(asked[0], *answers)}


def backgrounds(
    questions: Sequence[Question], own: Sequence[Answer], other: Sequence[Answer]
) -> dict[str, dict[str, float]]:
    """Accuracy on each of two backgrounds, its `change`, and `differing`, the share of answers that are others."""
    on_own, on_other = is_right(questions, own), is_right(questions, other)
    differs = np.array([one.text != two.text for one, two in zip(own, other, strict=True)], float)
    found = {"own": on_own, "other": on_other, "change": on_other - on_own, "differing": differs}
    bootstrap = bootstrap_of(questions)
    return {name: asdict(bootstrap.mean(values)) for name, values in found.items()}


def backgrounds_table(report: dict[str, Any]) -> str:
    """What was found, in a sentence."""
    data = report["data"]
    return (
        f"{data['num_questions']:,} questions about {data['num_images']:,} busy scenes: {report['own']['value']:.1%} "
        f"right on one background, {report['other']['value']:.1%} on another, a change of "
        f"{points(**report['change'])} points; {report['differing']['value']:.1%} of the answers differ."
    )


def _grey(model: InProcess, num_questions: int) -> dict[str, Any]:
    with held_out(num_questions, PICTURES) as questions, TemporaryDirectory() as folder:
        blank = [replace(question, image=_grey_image(question.image, Path(folder))) for question in questions]
        with_image, without = ([answer for [answer] in model.answers(asked, [])] for asked in (questions, blank))
        return {"data": describe_questions(questions), "kinds": lost_without(questions, with_image, without)}


def _grey_image(image: Path, folder: Path) -> Path:
    """A grey image of the same size, in a folder."""
    grey = folder / image.name
    if not grey.exists():
        with Image.open(image) as original:
            Image.new("RGB", original.size, "grey").save(grey)
    return grey


def lost_without(
    questions: Sequence[Question], with_image: Sequence[Answer], without: Sequence[Answer]
) -> dict[str, dict[str, Any]]:
    """For all questions and each kind: accuracy with the image and with a grey one, and its `change`."""
    right, right_grey = is_right(questions, with_image), is_right(questions, without)
    figures = {"image": right, "grey": right_grey, "change": right_grey - right}
    bootstrap = bootstrap_of(questions)
    return {
        kind: {name: asdict(bootstrap.mean(values, where)) for name, values in figures.items()}
        for kind, where in _by_kind(questions)
    }


def grey_table(report: dict[str, Any]) -> str:
    """Accuracy with the image and with a grey one by kind of picture, as Markdown."""
    rows = [
        [kind, f"{found['image']['value']:.1%}", f"{found['grey']['value']:.1%}", points(**found["change"])]
        for kind, found in report["kinds"].items()
    ]
    asked = f"{report['data']['num_questions']:,} questions; points, with 95 % intervals."
    return f"{markdown(['picture', 'with the image', 'with a grey one', 'change'], rows)}\n\n{asked}"


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


def _default(model: InProcess, num_questions: int) -> dict[str, Any]:
    with held_out(num_questions, PICTURES, _SEED) as own, held_out(num_questions, PICTURES) as questions:
        tried = list(_measured(model, own, _CANDIDATES))
        chosen = {rows: best([each for each in tried if each["rows"] == rows]) for rows in _ROWS}
        shown = {_PUBLISHED.name, *chosen.values(), *(control.name for control in _CONTROLS)}
        return {
            "chosen_by": describe_questions(own),
            "data": describe_questions(questions),
            "chosen": [{"rows": rows, "name": name} for rows, name in chosen.items()],
            "tried": tried,
            "measured": list(_measured(model, questions, [each for each in _CANDIDATES if each.name in shown])),
        }


def best(tried: Sequence[dict[str, Any]]) -> str:
    """The name of the candidate whose worst kind loses least; of equal ones the first."""
    found: str = max(tried, key=lambda each: min(change["value"] for change in each["changes"].values()))["name"]
    return found


def _measured(
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


def default_table(report: dict[str, Any]) -> str:
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


_BENCHMARKS: Final = {
    "backgrounds": (_backgrounds, backgrounds_table, 2000),
    "grey": (_grey, grey_table, 500),
    "default": (_default, default_table, 600),
}


def main() -> None:
    """Ask, write, tell."""
    arguments = command_line(__doc__, "pictures", subject=[*_BENCHMARKS], questions=None, model=None)
    model = InProcess(load_model(ModelConfig(model=arguments.model, dtype="float32"), EngineConfig()))
    for name in arguments.subject:
        measure, table, num_questions = _BENCHMARKS[name]
        found = measure(model, int(arguments.questions or num_questions))
        print(table(finish(arguments, {"model": model.describe(), **found}, f"{name}.json")))


if __name__ == "__main__":
    main()
