"""Charts that matplotlib draws: bars and lines; "Which year is highest?".

Axes are drawn from single artists, which is seven times as fast as pyplot's.
"""

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from training.marks import BAR, Mark, sign_mark
from training.questions import Turn
from training.scenes import COLOURS, TILE_SIZE, Split

__all__ = ["Chart", "ask_chart_questions", "sample_chart"]

_KIND = "chart"
_DPI = 100
_LABEL_SIZE = 13
"""Pixels of a label's font."""
_SIGN_WIDTH = 8.3
"""Pixels of one sign of it."""
_INKS = tuple(name for name in COLOURS if name not in ("white", "yellow"))


@dataclass(frozen=True, slots=True)
class Chart:
    """Values of a few categories, as bars or as one line."""

    width: int
    height: int
    is_line: bool
    labels: tuple[str, ...]
    """Years, or letters."""
    values: tuple[int, ...]
    """2 to 20; no two are nearer than what can be seen."""
    colours: tuple[str, ...]
    """Of each bar; all the same for a line."""
    paper: tuple[float, float, float]
    """0 to 1."""
    has_grid: bool

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    @property
    def _floor(self) -> int:
        return self.height - _LABEL_SIZE - 6

    def _centre(self, index: int) -> float:
        return 6 + (self.width - 12) * (index + 0.5) / len(self.values)

    def _top(self, index: int) -> float:
        return self._floor - (self._floor - 5) * self.values[index] / 20

    @property
    def _half(self) -> float:
        return (self.width - 12) / len(self.values) * 0.36

    @property
    def marks(self) -> tuple[Mark, ...]:
        """Bars and the signs of their labels."""
        found: list[Mark | None] = []
        for index, label in enumerate(self.labels):
            x = self._centre(index)
            if not self.is_line:
                box = (x - self._half, self._top(index), x + self._half, self._floor)
                found.append(Mark(box, BAR, self.colours[index]))
            left = x - len(label) * _SIGN_WIDTH / 2
            for place, sign in enumerate(label):
                where = left + place * _SIGN_WIDTH
                found.append(sign_mark((where, self._floor + 2, where + _SIGN_WIDTH, self.height), sign))
        return tuple(mark for mark in found if mark is not None)

    def draw(self) -> Image.Image:
        """The chart in RGB."""
        figure, canvas = _canvas(self.width, self.height)
        figure.clear()
        figure.set_facecolor(self.paper)
        across, up = 1 / self.width, 1 / self.height
        points = [(self._centre(i) * across, 1 - self._top(i) * up) for i in range(len(self.values))]
        floor = 1 - self._floor * up
        if self.has_grid:
            for share in (0.25, 0.5, 0.75, 1.0):
                height = floor + share * (1 - floor - 5 * up)
                figure.add_artist(Line2D([0.02, 0.98], [height] * 2, color=(0.75, 0.75, 0.75), linewidth=0.6))
        if self.is_line:
            xs, ys = [x for x, _ in points], [y for _, y in points]
            figure.add_artist(Line2D(xs, ys, color=_ink(self.colours[0]), linewidth=2, marker="o", markersize=4))
        else:
            for (x, y), colour in zip(points, self.colours, strict=True):
                half = self._half * across
                figure.add_artist(Rectangle((x - half, floor), 2 * half, y - floor, color=_ink(colour)))
        figure.add_artist(Line2D([0.02, 0.98], [floor, floor], color="black", linewidth=1))
        for (x, _), label in zip(points, self.labels, strict=True):
            figure.text(x, 1.5 * up, label, ha="center", va="bottom", fontsize=_LABEL_SIZE * 72 / _DPI)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def sample_chart(rng: random.Random, split: Split) -> Chart:
    """Draw a chart's content; the two splits never share one.

    Args:
        rng: the only source of chance.
        split: whose combinations of values it may show.
    """
    high, wide = rng.choices(((1, 1), (1, 2), (2, 2), (1, 3)), (0.15, 0.3, 0.3, 0.25))[0]
    width, height = wide * TILE_SIZE, high * TILE_SIZE
    has_years = wide > 1 and rng.random() < 0.5
    most = min(6, (width - 12) // (39 if has_years else 18))
    count = rng.randint(min(2, most), most)
    if has_years:
        first = rng.randint(1990, 2030 - count)
        labels = tuple(str(first + index) for index in range(count))
    else:
        labels = tuple("ABCDEF"[:count])
    is_line = rng.random() < 0.3
    colours = (rng.choice(_INKS),) * count if is_line or rng.random() < 0.3 else _different(rng, count)
    red, green, blue = (rng.uniform(0.88, 1.0) for _ in range(3))
    while True:
        values = tuple(rng.sample(range(2, 21, 2 if height == TILE_SIZE or count < 6 else 1), count))
        if (sum(values) + values[0]) % 8 == 0 or split == "train":
            break
    if split == "train" and (sum(values) + values[0]) % 8 == 0:
        return sample_chart(rng, split)
    return Chart(width, height, is_line, labels, values, colours, (red, green, blue), rng.random() < 0.4)


def ask_chart_questions(rng: random.Random, chart: Chart, count: int) -> list[Turn]:
    """Ask different questions.

    Args:
        rng: the only source of chance.
        chart: what is drawn.
        count: how many to ask at most.
    """
    what = "year" if len(chart.labels[0]) > 1 else ("point" if chart.is_line else "bar")
    by_value = sorted(range(len(chart.values)), key=lambda index: chart.values[index])
    highest, lowest = by_value[-1], by_value[0]
    asked = [(f"Which {what} is highest?", chart.labels[highest]), (f"Which {what} is lowest?", chart.labels[lowest])]
    asked.append((f"How many {'points' if chart.is_line else 'bars'} are there?", str(len(chart.values))))
    one, other = rng.sample(range(len(chart.values)), 2)
    higher = "yes" if chart.values[one] > chart.values[other] else "no"
    asked.append((f"Is {chart.labels[one]} higher than {chart.labels[other]}?", higher))
    if chart.is_line:
        asked.append(("What colour is the line?", chart.colours[0]))
    elif len(set(chart.colours)) > 1:
        asked.append(("What colour is the highest bar?", chart.colours[highest]))
        asked.append(("What colour is the lowest bar?", chart.colours[lowest]))
    return [Turn(question, answer, _KIND) for question, answer in rng.sample(asked, min(count, len(asked)))]


def _different(rng: random.Random, count: int) -> tuple[str, ...]:
    return tuple(rng.sample(_INKS, count))


def _ink(colour: str) -> tuple[float, float, float]:
    red, green, blue = COLOURS[colour]
    return red / 255, green / 255, blue / 255


@cache
def _canvas(width: int, height: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    return figure, FigureCanvasAgg(figure)  # its methods are not typed
