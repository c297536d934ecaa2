"""Objects to recognise: drawings and photographs of stamps and emoji, several of every class.

Every fourth picture of a class is held out: its class is known then, the picture is not. Training shows clip art and
other designers' emoji too, of those signs that are not held out.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from training.clip_art import clip_art
from training.emoji import draw_emoji, other_emoji
from training.scenes import Split
from training.sources import find_files, packages_folder

__all__ = ["ANIMALS", "CLASSES", "Sticker", "draw_sticker", "emoji_signs", "object_ids", "sample_sticker"]

_LONG_SIDE = 96
"""Pixels that stamps and emoji are shrunk to."""

_EMOJI_SIZE = 109
"""The only size that Noto's bitmaps have."""


def _range(first: int, last: int) -> str:
    return "".join(map(chr, range(first, last + 1)))


_STAMPS: dict[str, tuple[str, ...]] = {
    "bird": ("animals/birds/**/[!pt][!eu][!nx]*.png",),
    "car": ("vehicles/auto/**/[bs]*.png", "vehicles/emergency/**/sedan*.png", "vehicles/race/**/*.png"),
    "coin": ("symbols/money/**/[0-9]*.png",),
    "fish": ("animals/fish/*fish*.png", "animals/fish/*[gtw]r[oa]*.png"),
    "flower": ("plants/flowers/**/*.png",),
    "fruit": ("food/fruit/**/*.png",),
    "house": ("town/houses/**/*.png",),
    "insect": ("animals/insects/**/[bdfghlmx]*.png",),
}
"""Class and files below the stamps' folder."""

_EMOJI: dict[str, str] = {
    "bird": "🐔🐓🐤🐦🐧🕊🦃🦅🦆🦉🦚🦜🦢🦤🦩",
    "car": "🏎🚓🚔🚕🚖🚗🚘🚙🚐🚑🛻",
    "clock": _range(0x1F550, 0x1F567),
    "coin": "🪙",
    "face": _range(0x1F600, 0x1F637) + _range(0x1F641, 0x1F644) + "🤐🤑🤒🤓🤔🤕🤗🤣🤤🤥🤧🤨🤩🤪🤫🤬🤭🤯🥰🥱🥲🥳🥴🥺🧐",
    "fish": "🐟🐠🐡🦈",
    "flower": "🌷🌸🌹🌺🌻🌼🏵💮🪷",
    "fruit": _range(0x1F347, 0x1F353) + "🍅🥝🥭🥥🫐",
    "hand": "☝✊✋✌👆👇👈👉👊👋👌👍👎🖐🖖🤏🤘🤙🤚🤛🤜🤞🤟🫱🫲🫳🫴🫵",
    "house": "🏚🏠🏡🏢🏣🏤🏥🏦🏨🏩🏪🏫🏬🏭🏯🏰⛪🛖",
    "insect": "🐛🐜🐝🐞🦋🦗🦟🪰🪲🪳",
    "moon": _range(0x1F311, 0x1F31D),
    "train": "🚂🚃🚄🚅🚆🚇🚈🚊🚋🚝🚞",
}
"""Class and its emoji."""

_FLAGS = (
    "ARATAUBEBGBRCACHCLCNCOCUCZDEDKEEEGESFIFRGBGHGRHRHUIDIEILINISITJMJPKEKRLTLULVMAMXNGNLNONPNZPAPEPHPKPLPTRORSSESI"
    "SKTHTNTRUAUSUYVNZA"
)
"""Countries, two letters each."""

CLASSES: tuple[str, ...] = tuple(sorted({*_STAMPS, *_EMOJI, "flag"}))
"""What an object can be called."""

ANIMALS = ("bird", "fish", "insect")


@dataclass(frozen=True, slots=True)
class Sticker:
    """One object on a picture."""

    name: str
    """One of `CLASSES`."""
    instance: int
    """Which picture of the class."""
    x: int
    """Pixels from the left to the centre."""
    y: int
    """Pixels from the top to the centre."""
    size: int
    """Pixels along the longer side."""
    is_flipped: bool = False
    degrees: float = 0.0
    """Turned counter-clockwise."""
    brightness: float = 1.0
    saturation: float = 1.0
    stretch: float = 1.0
    """Factor of the width."""
    hue: int = 0
    """How far colours are turned around their circle of 256."""
    shear: float = 0.0
    """Pixels to the right for each pixel down."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom, in pixels; a little less than the square around it."""
        half = self.size * 0.42
        return self.x - half, self.y - half, self.x + half, self.y + half


def sample_sticker(rng: random.Random, split: Split, name: str, x: int, y: int, size: int) -> Sticker:
    """Draw an object of a class; training turns, mirrors, bends and tints its few pictures.

    Args:
        rng: the only source of chance.
        split: whose pictures it may show.
        name: one of `CLASSES`.
        x: pixels from the left to the centre.
        y: pixels from the top to the centre.
        size: pixels along the longer side.
    """
    instance = rng.choice(object_ids(split)[name])
    if split == "held_out":
        return Sticker(name, instance, x, y, size)
    degrees = rng.uniform(-30, 30) if rng.random() < 0.6 else 0.0
    light, colour, stretch = rng.uniform(0.65, 1.25), rng.uniform(0.2, 1.5), rng.uniform(0.7, 1.4)
    hue = rng.randrange(256) if rng.random() < 0.3 else rng.randint(-10, 10) % 256
    shear = rng.uniform(-0.3, 0.3) if rng.random() < 0.5 else 0.0
    is_flipped = rng.random() < 0.5
    return Sticker(name, instance, x, y, size, is_flipped, degrees, light, colour, stretch, hue, shear)


def draw_sticker(image: Image.Image, sticker: Sticker) -> None:
    """Lay an object on a picture."""
    shown = _picture(sticker.name, sticker.instance)
    wide, high = shown.width * sticker.stretch, shown.height
    scale = sticker.size / max(wide, high)
    shown = shown.resize((max(1, int(wide * scale)), max(1, int(high * scale))), Image.Resampling.BOX)
    shown = ImageOps.mirror(shown) if sticker.is_flipped else shown
    shown = _sheared(shown, sticker.shear) if sticker.shear else shown
    if sticker.degrees:
        shown = shown.rotate(sticker.degrees, Image.Resampling.BILINEAR, expand=True)
    place = sticker.x - shown.width // 2, sticker.y - shown.height // 2
    image.paste(_tinted(shown.convert("RGB"), sticker), place, shown.getchannel("A"))


def _sheared(picture: Image.Image, shear: float) -> Image.Image:
    """A picture whose rows are moved, each by `shear` pixels more than the one above, on so much more room."""
    lowest = shear * picture.height
    source_of = (1, -shear, min(0.0, lowest), 0, 1, 0)  # x and y from those of the result
    size = picture.width + int(abs(lowest)), picture.height
    return picture.transform(size, Image.Transform.AFFINE, source_of, Image.Resampling.BILINEAR)


def _tinted(picture: Image.Image, sticker: Sticker) -> Image.Image:
    if sticker.hue:
        turned = np.array(picture.convert("HSV"))
        turned[..., 0] += np.uint8(sticker.hue)
        picture = Image.fromarray(turned, "HSV").convert("RGB")
    if sticker.saturation != 1:
        picture = ImageEnhance.Color(picture).enhance(sticker.saturation)
    return picture if sticker.brightness == 1 else ImageEnhance.Brightness(picture).enhance(sticker.brightness)


@cache
def object_ids(split: Split) -> dict[str, list[int]]:
    """For each class, the pictures that a split may show; what only training shows comes last."""
    found = {}
    for name in CLASSES:
        examined = range(len(_examined(name)))
        found[name] = [index for index in examined if _is_held_out(index) == (split == "held_out")]
        if split == "train":
            more = range(len(examined), len(examined) + len(_more(name)))
            # All photographs are among the examined: these come about as often as what only training shows.
            found[name] = [*found[name] * max(1, round(len(more) / len(found[name]))), *more]
    return found


def _is_held_out(index: int) -> bool:
    return index % 4 == 2


def _picture(name: str, instance: int) -> Image.Image:
    examined = _examined(name)
    return examined[instance] if instance < len(examined) else _more(name)[instance - len(examined)]


@cache
def _examined(name: str) -> list[Image.Image]:
    return _cut_out(f"{name}/examined", lambda: [*map(_open, _stamps(name)), *_emoji(name)])


@cache
def _more(name: str) -> list[Image.Image]:
    clips, drawings = clip_art(name), other_emoji(emoji_signs(name, "train"))
    chosen = hashlib.sha256("\n".join(path.name for path in (*clips, *drawings)).encode()).hexdigest()
    return _cut_out(f"{name}/more-{chosen[:8]}", lambda: [*map(_open, clips), *map(draw_emoji, drawings)])


def _cut_out(place: str, draw: Callable[[], list[Image.Image]]) -> list[Image.Image]:
    """Small pictures without their margins, which are kept in a folder."""
    folder = packages_folder() / "cut_out" / place
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(draw()):
            cut = picture.crop(picture.getchannel("A").getbbox())
            cut.thumbnail((_LONG_SIDE, _LONG_SIDE), Image.Resampling.LANCZOS)
            cut.save(part / f"{index:03}.png")
        part.replace(folder)
    return [_open(path) for path in sorted(folder.iterdir())]


def _open(path: Path) -> Image.Image:
    return Image.open(path).convert("RGBA")


def _stamps(name: str) -> list[Path]:
    files = [
        path
        for pattern in _STAMPS.get(name, ())
        for path in find_files("tuxpaint-stamps-default", f"usr/share/tuxpaint/stamps/{pattern}")
    ]
    return [path for path in dict.fromkeys(files) if "mirror" not in path.stem]


def emoji_signs(name: str, split: Split) -> list[str]:
    """The emoji of a class that a split may show.

    Args:
        name: one of `CLASSES`.
        split: whose.
    """
    first = len(_stamps(name))
    return [sign for index, sign in enumerate(_signs(name), first) if _is_held_out(index) == (split == "held_out")]


def _signs(name: str) -> list[str]:
    if name != "flag":
        return list(_EMOJI.get(name, ""))
    pairs = zip(_FLAGS[::2], _FLAGS[1::2], strict=True)
    return ["".join(chr(0x1F1E6 + ord(letter) - ord("A")) for letter in pair) for pair in pairs]


def _emoji(name: str) -> list[Image.Image]:
    path = find_files("fonts-noto-color-emoji", "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")[0]
    font = ImageFont.truetype(path, _EMOJI_SIZE)
    drawn = []
    for sign in _signs(name):
        picture = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(picture).text((10, 10), sign, font=font, embedded_color=True)
        drawn.append(picture)
    return drawn
