"""Measures the embedded model on held-out questions: `python -m training.evaluate --questions 1000`.

Greedy generation by the mended peer, exact match, by kind of question; and once more with the image replaced
by a grey one, which says how much of it the questions give away. Writes `report.json`; `training.readme` shows it.
"""

import argparse
import json
import os
import platform
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, MllamaForConditionalGeneration, MllamaProcessor

from training.examples import DATA_VERSION, Example, example_rng, generate_example
from training.export import CHECKPOINT
from training.mended import mend
from training.questions import Turn
from training.scenes import SHAPES

__all__ = ["Score", "answer", "held_out_questions", "main", "score"]


@dataclass(frozen=True, slots=True)
class Score:
    """Exact matches of one kind of question."""

    asked: int
    right: int
    right_grey: int
    """Right with a grey image of the same size instead."""
    shapes_named: int
    """Shapes that the answers name, with the image: how much a description tells."""


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


def score(
    model: MllamaForConditionalGeneration,
    processor: MllamaProcessor,
    questions: list[tuple[Image.Image, Turn]],
    batch_size: int = 48,
) -> dict[str, Score]:
    """Exact match by kind, with the image and with a grey one.

    Args:
        model: a mended Mllama.
        processor: its processor.
        questions: see `held_out_questions`.
        batch_size: questions answered together.
    """
    tallies: dict[str, list[int]] = {}
    for start in range(0, len(questions), batch_size):
        part = questions[start : start + batch_size]
        seen = answer(model, processor, [(image, turn.question) for image, turn in part])
        grey = [Image.new("RGB", image.size, (110, 110, 110)) for image, _ in part]
        blind = answer(model, processor, [(g, turn.question) for g, (_, turn) in zip(grey, part, strict=True)])
        for (_, turn), one, other in zip(part, seen, blind, strict=True):
            tally = tallies.setdefault(turn.kind, [0, 0, 0, 0])
            num_shapes = sum(word.strip(",.") in SHAPES for word in one.split())
            for place, more in enumerate((1, one == turn.answer, other == turn.answer, num_shapes)):
                tally[place] += more
    return {kind: Score(*tally) for kind, tally in sorted(tallies.items())}


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
    scores = score(model, processor, held_out_questions(arguments.questions))
    report = _report(scores, json.loads((arguments.checkpoint / "trimserve.json").read_text()))
    (Path(__file__).parent / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def _report(scores: dict[str, Score], about: dict[str, object]) -> dict[str, object]:
    everything = _total(scores)
    return {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "data_version": DATA_VERSION,
        "training": {name: about[name] for name in ("training_steps", "training_minutes")},
        "questions": {kind: tally.asked for kind, tally in scores.items()} | {"overall": everything.asked},
        "accuracy": {kind: _share(tally.right, tally) for kind, tally in scores.items()}
        | {"overall": _share(everything.right, everything)},
        "objects_per_description": round(scores["description"].shapes_named / scores["description"].asked, 2),
        "accuracy_grey_image": {kind: _share(tally.right_grey, tally) for kind, tally in scores.items()}
        | {"overall": _share(everything.right_grey, everything)},
    }


def _total(scores: dict[str, Score]) -> Score:
    tallies = scores.values()
    return Score(*(sum(getattr(tally, field.name) for tally in tallies) for field in fields(Score)))


def _share(hits: int, tally: Score) -> float:
    return round(hits / tally.asked, 4)


if __name__ == "__main__":
    main()
