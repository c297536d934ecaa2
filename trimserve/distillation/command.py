"""`trimserve train-compressor`: options in, a file out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from trimserve.config import Config
from trimserve.evaluation.dataset import Question, load_questions
from trimserve.evaluation.progress import progress
from trimserve.knobs import with_knobs

if TYPE_CHECKING:
    from trimserve.distillation.lessons import Lessons
    from trimserve.distillation.students import Student
    from trimserve.model.mllama import Mllama

__all__ = ["train_compressor"]

_WITHOUT_EFFECT = ("adapter", "codebook", "compressor", "guide_model", "k_ratio", "merge_ratio")
"""Knobs: the teacher is the untrimmed base model."""


@with_knobs("model", without=_WITHOUT_EFFECT)
def train_compressor(
    method: Annotated[str, typer.Option(help="Policy that is to learn.")],
    data: Annotated[Path, typer.Option(help="JSONL file: image and question on each line; answers are not asked for.")],
    out: Annotated[Path, typer.Option(help="File to write, in safetensors; beside it OUT.state until it is done.")],
    rows: Annotated[
        int, typer.Option(min=0, help="Rows that a tile comes to, its class token included; 0 where none are made.")
    ] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of one batch.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Questions of a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0, help="At its height.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of the first weights and of the order of questions.")] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for what the model sees and answers; serves other methods too. Default: OUT.cache."),
    ] = None,
    num_threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of one op on the CPU; default: PyTorch's choice.")
    ] = None,
    *,
    config: Config,
) -> None:
    """Train what a policy has to learn: to give the untrimmed model's answers, on your own images, without labels."""
    import torch

    from trimserve.distillation.train import Recipe, split, train
    from trimserve.model.loading import load_model
    from trimserve.model.trained_file import save_trained

    questions = load_questions(data, need_answers=False)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    model = load_model(config.model, config.engine)
    torch.manual_seed(seed)
    student = _student(method, rows, model)
    features = config.model.intermediate_features
    folder = cache or out.with_name(f"{out.name}.cache")
    lessons = _lessons(folder, model, questions, features)
    num_learned = len(split(lessons)[0])
    if batch > num_learned:
        raise typer.BadParameter(f"must be at most {num_learned}, the questions to learn from", param_hint="--batch")
    origin = lessons.origin
    recipe = Recipe(method, rows, steps, batch, learning_rate, seed, origin.data, origin.model_revision)
    out.parent.mkdir(parents=True, exist_ok=True)
    state = out.with_name(f"{out.name}.state")
    with progress("steps", steps) as advance:
        curve = train(student, lessons, recipe, state, torch.device(model.info.device), advance)
    training = {name: getattr(recipe, name) for name in ("data", "steps", "batch", "learning_rate", "seed")}
    save_trained(out, method, student.module, model.info, features, curve, training)
    state.unlink(missing_ok=True)
    told = f"{out}: loss {curve[0].loss:.4f} -> {curve[-1].loss:.4f} on questions that it did not learn from"
    Console(stderr=True).print(told, highlight=False, markup=False, soft_wrap=True)


def _student(method: str, rows: int, model: "Mllama") -> "Student":
    from trimserve.distillation.students import student_of
    from trimserve.model.trained_file import trainable

    if method not in trainable():
        raise typer.BadParameter(f"must be among {', '.join(trainable())}, got {method!r}", param_hint="--method")
    try:
        return student_of(method, rows, model)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--rows") from None


def _lessons(folder: Path, model: "Mllama", questions: list[Question], intermediate_features: str) -> "Lessons":
    """The cache; made now if it is not there."""
    from trimserve.distillation.lessons import Lessons
    from trimserve.distillation.teacher import origin_of, write_lessons

    origin = origin_of(model, intermediate_features, questions)
    if not Lessons.is_in(folder):
        with progress("questions", len(questions)) as advance:
            write_lessons(folder, model, questions, origin, advance)
    return Lessons(folder, origin)
