"""What answers about harder pictures depend on.

    python -m benchmarks.bench_pictures [--questions N] [--model DIR] [--out DIR]

- `backgrounds`: the same questions about the same busy scenes on two photographs each, untrimmed: whether they are
  answered from what lies on the photograph, or from the photograph.
- `grey`: the same questions with a grey image, untrimmed: what the questions alone give away.

Each asks a number of questions of its own where none is given, the embedded model where no other is named. No times are
measured: a busy machine does no harm.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from PIL import Image

from benchmarks.report import command_line, finish, markdown, points
from training.backgrounds import BACKGROUNDS, write_backgrounds
from training.examples import PICTURES
from training.heldout import held_out
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.answers import Answer
from trimserve.evaluation.dataset import Question, describe_questions, load_questions
from trimserve.evaluation.in_process import InProcess
from trimserve.evaluation.report import bootstrap_of, is_right, where_by_kind
from trimserve.model.loading import load_model

__all__ = ["backgrounds", "backgrounds_table", "grey_table", "lost_without", "main"]


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
        for kind, where in where_by_kind(questions).items()
    }


def grey_table(report: dict[str, Any]) -> str:
    """Accuracy with the image and with a grey one by kind of picture, as Markdown."""
    rows = [
        [kind, f"{found['image']['value']:.1%}", f"{found['grey']['value']:.1%}", points(**found["change"])]
        for kind, found in report["kinds"].items()
    ]
    asked = f"{report['data']['num_questions']:,} questions; points, with 95 % intervals."
    return f"{markdown(['picture', 'with the image', 'with a grey one', 'change'], rows)}\n\n{asked}"


_BENCHMARKS: Final = {
    "backgrounds": (_backgrounds, backgrounds_table, 2000),
    "grey": (_grey, grey_table, 500),
}


def main() -> None:
    """Ask, write, tell."""
    arguments = command_line(__doc__, "pictures", questions=None, model=None)
    model = InProcess(load_model(ModelConfig(model=arguments.model, dtype="float32"), EngineConfig()))
    for name, (measure, table, num_questions) in _BENCHMARKS.items():
        found = measure(model, int(arguments.questions or num_questions))
        print(table(finish(arguments, {"model": model.describe(), **found}, f"{name}.json")))


if __name__ == "__main__":
    main()
