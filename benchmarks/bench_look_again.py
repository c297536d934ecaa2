"""What a second look at the region with most votes is worth, on small writing.

    python -m benchmarks.bench_look_again [--questions 320] [--out FILE]

Held-out scenes of several tiles with digits or a word in them are spread over a canvas that is larger by a factor,
while everything on it keeps its size in pixels: four tiles have to shrink the image, and the writing becomes small.
Each question is asked once, with the region that most heads voted for beside the image, and with a region at random,
all through the engine. Of each image equally many questions ask what is written and something else. Nothing here is a
time.
"""

import asyncio
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, Final

import numpy as np

from benchmarks.ours import chat, recommended
from benchmarks.report import command_line, finish, markdown, points
from tests.engine.driving import collect
from tests.engine.stepping import text
from training.examples import example_rng
from training.questions import Turn, ask_questions
from training.render import render
from training.scenes import TILE_SIZE, Scene, sample_scene
from trimserve.api.chunks import Finished, GenerationChunk, Started
from trimserve.api.prompt import CloserPrompt, PlainPrompt, Region
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import LookAgain, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.runner import Runner
from trimserve.evaluation.answers import UNTRIMMED
from trimserve.evaluation.metrics import Bootstrap, is_match
from trimserve.executor.local import LocalExecutor
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

__all__ = ["main", "spread", "table"]

_FACTORS: Final = (1, 2, 3)
_READING: Final = ("digits", "word", "sign")
"""Kinds of questions that ask what is written."""
_SETTINGS: Final = {
    "untrimmed": "once, untrimmed",
    "once": "once",
    "again": "most-voted region beside it",
    "random": "random region beside it",
}
_MOST_OF_A_SORT: Final = 2
"""Questions on one image that read, and that do not."""
_TOGETHER: Final = 8
"""Requests in the engine at once."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question and the number of its image."""

    image: int
    turn: Turn
    prompt: PlainPrompt
    elsewhere: Region


def spread(scene: Scene, factor: int) -> Scene:
    """The same things as large as before on a canvas that is larger; what lies left of what stays so."""
    writing = scene.writing
    return replace(
        scene,
        width=scene.width * factor,
        height=scene.height * factor,
        things=tuple(replace(thing, x=thing.x * factor, y=thing.y * factor) for thing in scene.things),
        writing=writing and replace(writing, left=writing.left * factor, top=writing.top * factor),
    )


def _questions(factor: int, count: int) -> list[_Asked]:
    """Of held-out scenes with writing; the same scenes for every factor, and the same questions but for chance."""
    asked: list[_Asked] = []
    for index in range(100 * count):
        rng = example_rng("held_out", 0, index)
        small = sample_scene(rng, "held_out")
        if small.writing is None or small.width * small.height <= TILE_SIZE**2:
            continue
        scene = spread(small, factor)
        buffer = io.BytesIO()
        render(scene).save(buffer, "PNG")
        side = LookAgain().side_ratio
        for turn in _balanced(ask_questions(rng, scene, 4 * _MOST_OF_A_SORT, "held_out")):
            begin = random.Random(f"region/{index}/{turn.question}")
            elsewhere = Region(begin.uniform(0, 1 - side), begin.uniform(0, 1 - side), side, side)
            asked.append(_Asked(index, turn, chat(turn.question, buffer.getvalue()), elsewhere))
        if len(asked) >= count:
            break
    return asked[:count]


def _balanced(turns: Sequence[Turn]) -> list[Turn]:
    reading = [turn for turn in turns if turn.kind in _READING]
    others = [turn for turn in turns if turn.kind not in _READING]
    count = min(len(reading), len(others), _MOST_OF_A_SORT)
    return [*reading[:count], *others[:count]]


def _request(asked: _Asked, setting: str, usual: TrimRequest) -> GenerationRequest:
    prompt = CloserPrompt(asked.prompt, asked.elsewhere) if setting == "random" else asked.prompt
    trim = UNTRIMMED if setting == "untrimmed" else usual
    trim = replace(usual, look_again=LookAgain()) if setting == "again" else trim
    return GenerationRequest(setting, prompt, SamplingParams(max_new_tokens=64), trim)


async def _answers(model: Mllama, questions: Sequence[_Asked]) -> dict[str, list[list[GenerationChunk]]]:
    """By setting, in the order of the questions."""
    limits = EngineConfig(max_batch=_TOGETHER, max_queue=len(questions))
    runner, usual = Runner(lambda: (model, LocalExecutor(model, 2**26)), limits), recommended(model.info)
    await runner.start()
    try:
        return {
            setting: await asyncio.gather(*(collect(runner, _request(asked, setting, usual)) for asked in questions))
            for setting in _SETTINGS
        }
    finally:
        await runner.stop(0.0)


def _rows(
    factor: int, questions: Sequence[_Asked], answers: dict[str, list[list[GenerationChunk]]]
) -> Iterator[dict[str, Any]]:
    """Figures of each setting; a change is beside `once`."""
    is_reading = np.array([asked.turn.kind in _READING for asked in questions])
    is_right = {
        setting: np.array([is_match(text(a), q.turn.answer) for a, q in zip(given, questions, strict=True)], float)
        for setting, given in answers.items()
    }
    drawn = Bootstrap(np.array([asked.image for asked in questions]))
    for setting, given in answers.items():
        found: dict[str, Any] = {"factor": factor, "setting": setting}
        for name, where in (("reading", is_reading), ("other", ~is_reading)):
            change = drawn.mean(is_right[setting] - is_right["once"], where)
            found[name] = {
                "questions": int(where.sum()),
                "accuracy": float(is_right[setting][where].mean()),
                "change": change.value,
                "change_interval": [change.low, change.high],
            }
        chunks = [chunk for answer in given for chunk in answer]
        shown = [chunk.images for chunk in chunks if isinstance(chunk, Started)]
        found["held_rows"] = mean(sum(image.held_rows for image in images) for images in shown)
        found["held_bytes"] = mean(chunk.cross_kv.held for chunk in chunks if isinstance(chunk, Finished))
        yield found


def table(report: dict[str, Any]) -> str:
    """What a second look is worth, as Markdown."""
    lines = []
    for row in report["rows"]:
        cells = [f"{row['factor']} x", _SETTINGS[row["setting"]]]
        for found in (row["reading"], row["other"]):
            change = "" if row["setting"] == "once" else points(found["change"], *found["change_interval"])
            cells += [f"{found['accuracy']:.1%}", change]
        lines.append([*cells, f"{row['held_rows']:.0f}", f"{row['held_bytes'] / 2**10:.0f}"])
    head = ["canvas", "the image is shown", "reading", "change, points", "other questions", "change, points"]
    counts = [f"{row['reading']['questions']} and {row['other']['questions']}" for row in report["rows"]]
    asked = ", ".join(dict.fromkeys(counts))
    return f"{markdown([*head, 'rows held', 'KiB held'], lines, words=2)}\n\nQuestions that read, and others: {asked}."


def main() -> None:
    """Ask, write, tell."""
    arguments = command_line(__doc__, "policies/look_again.json", questions=320)
    model = load_model(ModelConfig(), EngineConfig())
    rows: list[dict[str, Any]] = []
    for factor in _FACTORS:
        questions = _questions(factor, arguments.questions)
        rows += _rows(factor, questions, asyncio.run(_answers(model, questions)))
    figures = {"model": model.info.model_id, "side_ratio": LookAgain().side_ratio, "rows": rows}
    print(table(finish(arguments, figures)))


if __name__ == "__main__":
    main()
