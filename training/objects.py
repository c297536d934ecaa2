"""Objects to recognise: drawings and photographs of stamps and emoji, several of every class.

Every fourth picture of a class is held out: its class is known then, the picture is not.
"""

import random
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from training.scenes import Split
from training.sources import find_files, packages_folder

__all__ = ["ANIMALS", "CLASSES", "Sticker", "draw_sticker", "object_ids", "sample_sticker"]

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

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom, in pixels; a little less than the square around it."""
        half = self.size * 0.42
        return self.x - half, self.y - half, self.x + half, self.y + half


def sample_sticker(rng: random.Random, split: Split, name: str, x: int, y: int, size: int) -> Sticker:
    """Draw an object of a class; training turns, mirrors and tints its few pictures.

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
    degrees = rng.uniform(-20, 20) if rng.random() < 0.6 else 0.0
    light, colour, stretch = rng.uniform(0.75, 1.15), rng.uniform(0.5, 1.3), rng.uniform(0.8, 1.2)
    return Sticker(name, instance, x, y, size, rng.random() < 0.5, degrees, light, colour, stretch)


def draw_sticker(image: Image.Image, sticker: Sticker) -> None:
    """Lay an object on a picture."""
    shown = _pictures()[sticker.name][sticker.instance]
    wide, high = shown.width * sticker.stretch, shown.height
    scale = sticker.size / max(wide, high)
    shown = shown.resize((max(1, int(wide * scale)), max(1, int(high * scale))), Image.Resampling.BOX)
    shown = ImageOps.mirror(shown) if sticker.is_flipped else shown
    if sticker.degrees:
        shown = shown.rotate(sticker.degrees, Image.Resampling.BILINEAR, expand=True)
    tinted = shown.convert("RGB")
    if sticker.saturation != 1:
        tinted = ImageEnhance.Color(tinted).enhance(sticker.saturation)
    if sticker.brightness != 1:
        tinted = ImageEnhance.Brightness(tinted).enhance(sticker.brightness)
    image.paste(tinted, (sticker.x - shown.width // 2, sticker.y - shown.height // 2), shown.getchannel("A"))


@cache
def object_ids(split: Split) -> dict[str, list[int]]:
    """For each class, the pictures that a split may show."""
    return {
        name: [index for index in range(len(pictures)) if (index % 4 == 2) == (split == "held_out")]
        for name, pictures in _pictures().items()
    }


@cache
def _pictures() -> dict[str, list[Image.Image]]:
    folder = packages_folder() / "objects"
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        for name in CLASSES:
            (part / name).mkdir(parents=True, exist_ok=True)
            for index, picture in enumerate([*_stamps(name), *_emoji(name)]):
                box = picture.getchannel("A").getbbox()
                picture = picture.crop(box)
                picture.thumbnail((_LONG_SIDE, _LONG_SIDE), Image.Resampling.LANCZOS)
                picture.save(part / name / f"{index:03}.png")
        part.replace(folder)
    return {name: [Image.open(path).convert("RGBA") for path in sorted((folder / name).iterdir())] for name in CLASSES}


def _stamps(name: str) -> list[Image.Image]:
    files = [
        path
        for pattern in _STAMPS.get(name, ())
        for path in find_files("tuxpaint-stamps-default", f"usr/share/tuxpaint/stamps/{pattern}")
    ]
    return [Image.open(path).convert("RGBA") for path in dict.fromkeys(files) if "mirror" not in path.stem]


def _emoji(name: str) -> list[Image.Image]:
    signs = list(_EMOJI.get(name, ""))
    if name == "flag":
        signs = [
            "".join(chr(0x1F1E6 + ord(letter) - ord("A")) for letter in pair)
            for pair in zip(_FLAGS[::2], _FLAGS[1::2], strict=True)
        ]
    path = find_files("fonts-noto-color-emoji", "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")[0]
    font = ImageFont.truetype(path, _EMOJI_SIZE)
    drawn = []
    for sign in signs:
        picture = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(picture).text((10, 10), sign, font=font, embedded_color=True)
        drawn.append(picture)
    return drawn
