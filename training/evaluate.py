"""Measures the embedded model on held-out questions: `python -m training.evaluate --questions 1000`.

Greedy generation by the mended peer, exact match, by kind of question; and once more with the image replaced
by a grey one, which says how much of it the questions give away. Writes `report.json`; `training.readme` shows it.
"""

import argparse
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoProcessor, MllamaForConditionalGeneration, MllamaProcessor

from training.examples import DATA_VERSION, Example, example_rng, generate_example
from training.export import CHECKPOINT
from training.mended import mend
from training.questions import Turn
from training.scenes import SHAPES
from trimserve.evaluation.metrics import Bootstrap

__all__ = ["GROUPS", "Outcome", "answer", "held_out_questions", "main", "outcomes"]


GROUPS = {
    "single_word": ("colour", "count", "position", "shape", "sign", "yes_no"),
    "reading": ("digits", "word"),
    "description": ("description",),
}
"""Kinds of questions that have a bar in common."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question, answered."""

    kind: str
    image: int
    """Number of the image; questions on one image have the same."""
    is_right: bool
    is_right_grey: bool
    """With a grey image of the same size instead."""
    num_shapes: int
    """Shapes that the answer names, with the image: how much a description tells."""


def held_out_questions(count: int, seed: int = 0) -> list[tuple[Image.Image, Turn]]:
    """Images and questions that training never saw.

    Args:
        count: how many.
        seed: another seed, other questions.
    """
    found: list[tuple[Image.Image, Turn]] = []
    index = 0
    while len(found) < count:
        example: Example = generate_example(example_rng("held_out", seed, index), "held_out")
        found += [(example.image, turn) for turn in example.turns]
        index += 1
    return found[:count]


@torch.no_grad()
def answer(
    model: MllamaForConditionalGeneration, processor: MllamaProcessor, asked: list[tuple[Image.Image, str]]
) -> list[str]:
    """Answer questions about images, greedily, in one batch.

    Args:
        model: a mended Mllama.
        processor: its processor.
        asked: image and question.
    Returns:
        One answer for each question.
    """
    chats: list[Any] = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for _, text in asked
    ]
    prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
    inputs = processor(
        images=[[image] for image, _ in asked],
        text=prompts,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    decoder: Any = model  # generate is typed for a protocol that this model does not declare
    generated = decoder.generate(**inputs, do_sample=False, max_new_tokens=64)
    new: list[str] = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return new


def outcomes(
    model: MllamaForConditionalGeneration,
    processor: MllamaProcessor,
    questions: list[tuple[Image.Image, Turn]],
    batch_size: int = 48,
) -> list[Outcome]:
    """Answer every question with its image and with a grey one.

    Args:
        model: a mended Mllama.
        processor: its processor.
        questions: see `held_out_questions`.
        batch_size: questions answered together.
    """
    numbers: dict[int, int] = {}
    found = []
    for start in range(0, len(questions), batch_size):
        part = questions[start : start + batch_size]
        seen = answer(model, processor, [(image, turn.question) for image, turn in part])
        grey = [Image.new("RGB", image.size, (110, 110, 110)) for image, _ in part]
        blind = answer(model, processor, [(g, turn.question) for g, (_, turn) in zip(grey, part, strict=True)])
        for (image, turn), one, other in zip(part, seen, blind, strict=True):
            num_shapes = sum(word.strip(",.") in SHAPES for word in one.split())
            number = numbers.setdefault(id(image), len(numbers))
            found.append(Outcome(turn.kind, number, one == turn.answer, other == turn.answer, num_shapes))
    return found


def main() -> None:
    """Command line: measure and write `report.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = mend(MllamaForConditionalGeneration.from_pretrained(arguments.checkpoint)).eval()
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    found = outcomes(model, processor, held_out_questions(arguments.questions))
    report = _report(found, json.loads((arguments.checkpoint / "trimserve.json").read_text()))
    (Path(__file__).parent / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def _report(found: list[Outcome], about: dict[str, object]) -> dict[str, object]:
    kinds = np.array([outcome.kind for outcome in found])
    groups = {kind: kinds == kind for kind in sorted({*kinds})} | {"overall": np.ones(len(found), np.bool_)}
    is_right = np.array([outcome.is_right for outcome in found], np.float64)
    is_right_grey = np.array([outcome.is_right_grey for outcome in found], np.float64)
    num_shapes = np.array([outcome.num_shapes for outcome in found], np.float64)
    bootstrap = Bootstrap(np.array([outcome.image for outcome in found]))
    estimates = {name: bootstrap.mean(is_right, np.isin(kinds, of)) for name, of in GROUPS.items()}
    estimates["loss_with_grey_image"] = bootstrap.mean(is_right - is_right_grey)
    estimates["objects_per_description"] = bootstrap.mean(num_shapes, kinds == "description")
    return {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "data_version": DATA_VERSION,
        "training": {name: about[name] for name in ("training_steps", "training_minutes")},
        "questions": {name: int(where.sum()) for name, where in groups.items()},
        "accuracy": {name: _share(is_right[where]) for name, where in groups.items()},
        "accuracy_grey_image": {name: _share(is_right_grey[where]) for name, where in groups.items()},
        "estimates": {name: asdict(estimate) for name, estimate in estimates.items()},
    }


def _share(hits: NDArray[np.float64]) -> float:
    return round(float(hits.mean()), 4)


if __name__ == "__main__":
    main()
