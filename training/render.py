"""Draws a scene: varied background, clutter, anti-aliased things, real handwritten digits, printed words."""

import math
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter
from sklearn.datasets import load_digits

from training.photographs import Backdrop, draw_backdrop
from training.scenes import COLOURS, Scene, Thing, Warp, Writing, font

__all__ = ["render"]

_OVERSAMPLING = 4


def render(scene: Scene, scale: int = 1, backdrop: Backdrop | None = None) -> Image.Image:
    """Draw a scene; the same scene gives the same pixels.

    Args:
        scene: what to draw.
        scale: image pixels per scene pixel, at least 1.
        backdrop: a busy background; what lies on it gets a rim, without which a red star on red leaves is none.
    Returns:
        RGB image of scene.width * scale by scene.height * scale pixels.
    """
    rng = np.random.default_rng(scene.texture_seed)
    if backdrop is None:
        image = Image.fromarray(_background(rng, scene.width * scale, scene.height * scale, scene.is_light))
        _clutter(rng, image, scene.is_light, scale)
        rim = None
    else:
        image = draw_backdrop(backdrop, scene.width * scale, scene.height * scale)
        rim = (240, 240, 240) if scene.is_light else (15, 15, 15)
    for thing in scene.things:
        _draw_thing(rng, image, thing, scale, rim)
    if scene.writing is not None:
        _draw_writing(rng, image, scene.writing, scale, rim)
    return image


def _background(rng: np.random.Generator, width: int, height: int, is_light: bool) -> npt.NDArray[np.uint8]:
    low, high = (185, 235) if is_light else (15, 120)
    base = rng.integers(low, high) + rng.integers(-14, 15, size=3)
    pixels = np.broadcast_to(base.astype(np.float32), (height, width, 3)).copy()
    down, across = np.mgrid[0:height, 0:width].astype(np.float32)
    kind = rng.integers(4)
    if kind == 1:  # gradient
        slope = rng.normal(0, 20, size=2)
        pixels += (slope[0] * down / height + slope[1] * across / width)[..., None]
    elif kind == 2:  # stripes
        angle, pitch = rng.uniform(0, math.pi), rng.uniform(0.2, 1.2)
        wave = np.sin((down * math.sin(angle) + across * math.cos(angle)) * pitch)
        pixels += (rng.uniform(4, 12) * wave)[..., None]
    elif kind == 3:  # soft blobs
        coarse = rng.normal(0, 14, size=(height // 16 + 1, width // 16 + 1)).astype(np.float32)
        pixels += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))[..., None]
    pixels += rng.normal(0, rng.uniform(0, 6), size=(height, width, 1))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _clutter(rng: np.random.Generator, image: Image.Image, is_light: bool, scale: int) -> None:
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 2 + image.width * image.height // (1400 * scale**2))):
        grey = int(rng.integers(150, 225) if is_light else rng.integers(30, 125))
        red, green, blue = (int(v) for v in np.clip(grey + rng.integers(-12, 13, size=3), 0, 255))
        x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
        dx, dy = (int(v) * scale for v in rng.integers(-14, 15, size=2))
        if rng.random() < 0.6:
            draw.line((x, y, x + dx, y + dy), fill=(red, green, blue), width=scale)
        else:
            reach = int(rng.integers(1, 3)) * scale
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=(red, green, blue))


def _ink(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    varied = np.clip(np.array(COLOURS[colour]) * rng.uniform(0.88, 1.06) + rng.integers(-9, 10, size=3), 0, 255)
    red, green, blue = (int(v) for v in varied)
    return red, green, blue


_Colour = tuple[int, int, int]


def _draw_thing(rng: np.random.Generator, image: Image.Image, thing: Thing, scale: int, rim: _Colour | None) -> None:
    side = thing.size * scale
    place = (thing.x * scale - side // 2, thing.y * scale - side // 2)
    _paste(image, _ink(rng, thing.colour), place, _shape_mask(thing.shape, side), rim)


def _draw_writing(
    rng: np.random.Generator, image: Image.Image, writing: Writing, scale: int, rim: _Colour | None
) -> None:
    ink = _ink(rng, writing.colour)
    side = writing.height * scale
    if not writing.is_number:
        # The font's own space above the letters is cut away: `top` is where capitals begin.
        above = font(side).getbbox("H")[1]
        place = (writing.left * scale, writing.top * scale - int(above) + side // 8)
        wide = 0 if rim is None else scale
        ImageDraw.Draw(image).text(place, writing.text, fill=ink, font=font(side), stroke_width=wide, stroke_fill=rim)
        return
    for position, index in enumerate(writing.digit_images):
        mask = Image.fromarray(_digit_images()[index]).resize((side, side), Image.Resampling.BICUBIC)
        if writing.warps:
            mask = _warped(mask, writing.warps[position])
        _paste(image, ink, (writing.left * scale + position * side, writing.top * scale), mask, rim)


def _paste(image: Image.Image, ink: _Colour, place: tuple[int, int], mask: Image.Image, rim: _Colour | None) -> None:
    if rim is not None:
        wide = Image.new("L", (mask.width + 4, mask.height + 4))
        wide.paste(mask, (2, 2))
        image.paste(rim, (place[0] - 2, place[1] - 2), wide.filter(ImageFilter.MaxFilter(3)))
    image.paste(ink, place, mask)


def _warped(mask: Image.Image, warp: Warp) -> Image.Image:
    middle = mask.width / 2
    angle = math.radians(warp.degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    # PIL asks the other way round: where each point of the result comes from.
    a, b = cos / warp.wide, (-sin + cos * warp.shear) / warp.wide
    d, e = sin / warp.high, (cos + sin * warp.shear) / warp.high
    where = (a, b, middle - (a + b) * middle, d, e, middle - (d + e) * middle)
    return mask.transform(mask.size, Image.Transform.AFFINE, where, Image.Resampling.BICUBIC)


@cache
def _digit_images() -> npt.NDArray[np.uint8]:
    images: npt.NDArray[np.float64] = load_digits().images  # 0 to 16
    return np.clip(images * 17, 0, 255).astype(np.uint8)


@cache
def _shape_mask(shape: str, side: int) -> Image.Image:
    big = side * _OVERSAMPLING
    mask = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(mask)
    edge = big - 1
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, edge, edge), fill=255)
    if shape == "ring":
        rim = big * 0.27
        draw.ellipse((rim, rim, edge - rim, edge - rim), fill=0)
    elif shape == "square":
        draw.rectangle((big * 0.06, big * 0.06, big * 0.94, big * 0.94), fill=255)
    elif shape == "cross":
        draw.rectangle((big * 0.35, 0, big * 0.65, edge), fill=255)
        draw.rectangle((0, big * 0.35, edge, big * 0.65), fill=255)
    elif shape == "heart":
        draw.ellipse((0, big * 0.05, big * 0.53, big * 0.56), fill=255)
        draw.ellipse((big * 0.47, big * 0.05, edge, big * 0.56), fill=255)
        draw.polygon([(big * 0.05, big * 0.43), (big * 0.95, big * 0.43), (big * 0.5, edge)], fill=255)
    elif shape in _OUTLINES:
        draw.polygon([(x * edge, y * edge) for x, y in _OUTLINES[shape]], fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)


def _star() -> list[tuple[float, float]]:
    radii = (0.52, 0.22)
    angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return [(0.5 + radii[i % 2] * math.cos(a), 0.53 + radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)]


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "triangle": [(0.5, 0.02), (0.0, 0.95), (1.0, 0.95)],
    "diamond": [(0.5, 0.0), (0.88, 0.5), (0.5, 1.0), (0.12, 0.5)],
    "star": _star(),
}
