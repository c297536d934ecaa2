"""Pages of print in Debian's fonts: receipts, forms, tables and plain lines; "What is the total?".

A page is lines of words at places, so it is drawn and marked sign by sign from the same data.
"""

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.marks import Mark, sign_mark
from training.questions import Turn
from training.scenes import TILE_SIZE, Split
from training.sources import find_files
from training.words import HELD_OUT_WORDS, TRAIN_WORDS

__all__ = ["FONTS", "Page", "Print", "ask_page_questions", "sample_page"]

_KIND = "page"

FONTS: tuple[tuple[str, str], ...] = (
    ("fonts-dejavu-core", "dejavu/DejaVuSans.ttf"),
    ("fonts-dejavu-core", "dejavu/DejaVuSans-Bold.ttf"),
    ("fonts-dejavu-core", "dejavu/DejaVuSansMono.ttf"),
    ("fonts-dejavu-core", "dejavu/DejaVuSansMono-Bold.ttf"),
    ("fonts-liberation", "liberation/LiberationSans-Bold.ttf"),
    ("fonts-liberation", "liberation/LiberationMono-Bold.ttf"),
    ("fonts-freefont-ttf", "freefont/FreeSansBold.ttf"),
    ("fonts-freefont-ttf", "freefont/FreeMonoBold.ttf"),
)
"""Package and file: those that can still be read at 13 pixels."""

_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_FIELDS = ("NAME", "CITY", "AGE", "CODE")
_ORDINALS = ("first", "second", "third", "fourth", "fifth")


@dataclass(frozen=True, slots=True)
class Print:
    """One word or number at a place."""

    text: str
    x: int
    """Pixels from the left."""
    y: int
    """Pixels from the top to where capitals begin."""


@dataclass(frozen=True, slots=True)
class Page:
    """What is printed, and the paper."""

    width: int
    height: int
    rows: tuple[tuple[str, ...], ...]
    """Words of each line: what questions are about."""
    layout: str
    """`receipt`, `form`, `table` or `lines`."""
    prints: tuple[Print, ...]
    font: int
    """Index into `FONTS`."""
    font_size: int
    texture_seed: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    @property
    def marks(self) -> tuple[Mark, ...]:
        """Every sign at its place."""
        font = _font(self.font, self.font_size)
        found = []
        for print_ in self.prints:
            for index, sign in enumerate(print_.text):
                left, right = font.getlength(print_.text[:index]), font.getlength(print_.text[: index + 1])
                box = (print_.x + left, print_.y, print_.x + right, print_.y + self.font_size * 0.8)
                found.append(sign_mark(box, sign))
        return tuple(mark for mark in found if mark is not None)

    def draw(self) -> Image.Image:
        """The page in RGB."""
        rng = np.random.default_rng(self.texture_seed)
        paper = rng.integers(200, 250) + rng.integers(-8, 9, 3)
        slope = np.linspace(0, rng.uniform(-25, 10), self.height)[:, None, None]
        grain = rng.normal(0, rng.uniform(0, 7), (self.height, self.width, 1))
        image = Image.fromarray(np.clip(paper + slope + grain, 0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        dark = int(rng.integers(0, 70))
        ink = (dark, dark, dark + int(rng.integers(0, 60)))
        font = _font(self.font, self.font_size)
        if self.layout == "table":
            for y in sorted({print_.y for print_ in self.prints}):
                draw.line((2, y - 3, self.width - 3, y - 3), fill=(150, 150, 150))
        if self.layout == "receipt":
            y = self.prints[-1].y - 3
            draw.line((4, y, self.width - 5, y), fill=ink)
        above = int(font.getbbox("H")[1])
        for print_ in self.prints:
            draw.text((print_.x, print_.y - above), print_.text, fill=ink, font=font)
        return image


def sample_page(rng: random.Random, split: Split) -> Page:
    """Draw a page's content.

    Args:
        rng: the only source of chance.
        split: whose words may be printed.
    """
    layout = rng.choices(("receipt", "form", "table", "lines"), (0.35, 0.3, 0.15, 0.2))[0]
    high, wide = rng.choices(((2, 2), (1, 2), (1, 3)), (0.5, 0.3, 0.2))[0]
    width, height = TILE_SIZE * wide, TILE_SIZE * high
    font, size = rng.randrange(len(FONTS)), rng.randint(13, 16)
    most = (height - 4) // (size + 4)
    rows = tuple(_ROWS[layout](rng, split, most))
    prints = _lay_out(rng, rows, width, height, _font(font, size), size)
    if prints is None:
        return sample_page(rng, split)
    return Page(width, height, rows, layout, prints, font, size, rng.getrandbits(32))


def ask_page_questions(rng: random.Random, page: Page, count: int) -> list[Turn]:
    """Ask different questions.

    Args:
        rng: the only source of chance.
        page: what is printed.
        count: how many to ask at most.
    """
    if page.layout == "lines":
        asked = _ask_lines(page)
    else:
        asked = [(_question(page.layout, row[0]), " ".join(row[1:])) for row in page.rows if len(row) > 1]
    rng.shuffle(asked)
    asked = asked[: max(1, count - 1)]
    if rng.random() < 0.4:
        asked.append((rng.choice(("How many lines are there?", "How many rows are there?")), str(len(page.rows))))
    return [Turn(question, answer, _KIND) for question, answer in asked[:count]]


def _question(layout: str, label: str) -> str:
    if label in ("TOTAL", "DATE", *_FIELDS):
        return f"What is the {label.lower()}?"
    return f"How much is {label}?" if layout == "receipt" else f"What number is beside {label}?"


def _ask_lines(page: Page) -> list[tuple[str, str]]:
    words = [row[0] for row in page.rows]
    found = [(f"What is the {name} word?", word) for name, word in zip(_ORDINALS, words, strict=False)]
    return [*found, ("What is the last word?", words[-1])]


def _sample_receipt(rng: random.Random, split: Split, most: int) -> list[tuple[str, ...]]:
    dated = most >= 4 and rng.random() < 0.6
    items = rng.randint(1, min(4, most - 1 - dated))
    prices = [rng.randint(1, 49) for _ in range(items)]
    rows = [(_word(rng, split), str(price)) for price in prices]
    date = [("DATE", *_date(rng))] if dated else []
    return [*date, *_distinct(rows), ("TOTAL", str(sum(prices)))]


def _sample_form(rng: random.Random, split: Split, most: int) -> list[tuple[str, ...]]:
    values = {
        "NAME": (_word(rng, split),),
        "CITY": (_word(rng, split),),
        "AGE": (str(rng.randint(10, 99)),),
        "CODE": (str(rng.randint(100, 9999)),),
        "DATE": _date(rng),
    }
    fields = rng.sample(list(values), rng.randint(2, min(len(values), most)))
    return [(field, *values[field]) for field in fields]


def _sample_table(rng: random.Random, split: Split, most: int) -> list[tuple[str, ...]]:
    return _distinct([(_word(rng, split), str(rng.randint(1, 999))) for _ in range(rng.randint(2, min(6, most)))])


def _sample_lines(rng: random.Random, split: Split, most: int) -> list[tuple[str, ...]]:
    return [(_word(rng, split),) for _ in range(rng.randint(2, min(5, most)))]


_ROWS = {"receipt": _sample_receipt, "form": _sample_form, "table": _sample_table, "lines": _sample_lines}


def _distinct(rows: list[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Rows of different names: a question names one of them. A receipt keeps its sum by keeping every price."""
    seen: dict[str, int] = {}
    found: list[tuple[str, ...]] = []
    for name, value in rows:
        seen[name] = seen.get(name, 0) + 1
        found.append((name if seen[name] == 1 else f"{name[:3]}{'XYZW'[seen[name] % 4]}", value))
    return found


def _word(rng: random.Random, split: Split) -> str:
    if split == "held_out":
        return rng.choice(HELD_OUT_WORDS)
    if rng.random() < 0.5:
        return rng.choice(TRAIN_WORDS)
    while True:
        word = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(3, 5)))
        if word not in HELD_OUT_WORDS:
            return word


def _date(rng: random.Random) -> tuple[str, str]:
    return str(rng.randint(1, 28)), rng.choice(_MONTHS)


def _lay_out(
    rng: random.Random,
    rows: tuple[tuple[str, ...], ...],
    width: int,
    height: int,
    font: ImageFont.FreeTypeFont,
    size: int,
) -> tuple[Print, ...] | None:
    pitch = min(size + rng.randint(4, 8), (height - 4) // len(rows))
    if pitch < size + 2:
        return None
    top = rng.randint(3, max(3, height - pitch * len(rows)))
    left = rng.randint(3, 8)
    indent = max(font.getlength(row[0]) for row in rows) + left + rng.randint(8, 14)
    is_right = rng.random() < 0.4
    prints = []
    for number, (label, *value) in enumerate(rows):
        y, text = top + number * pitch, " ".join(value)
        length = font.getlength(text)
        x = width - 5 - length if is_right else indent
        if (value and x < indent - 3) or max(x + length, left + font.getlength(label)) > width - 3:
            return None
        prints += [Print(label, left, y)] + ([Print(text, int(x), y)] if value else [])
    return tuple(prints)


@cache
def _font(index: int, size: int) -> ImageFont.FreeTypeFont:
    package, file = FONTS[index]
    return ImageFont.truetype(find_files(package, f"usr/share/fonts/truetype/{file}")[0], size)
