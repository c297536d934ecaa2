"""Busy backgrounds: crops of real photographs, and dense textures where every patch says something.

A `Backdrop` is data; `draw_backdrop` makes its pixels. Every fourth photograph is held out.
"""

import random
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from training.scenes import Split
from training.sources import find_files, packages_folder

__all__ = ["Backdrop", "draw_backdrop", "photograph_ids", "sample_backdrop"]

_LONG_SIDE = 640
"""Pixels that photographs are shrunk to: crops of them are then full of detail."""

_SCIKIT_IMAGE = (
    *("astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel", "horse", "ihc"),
    *("moon", "motorcycle_left", "motorcycle_right"),
)


@dataclass(frozen=True, slots=True)
class Backdrop:
    """A background: a crop of a photograph, or a dense texture."""

    photograph: int | None
    """Index into the photographs, or None for a texture."""
    left: float
    """Of the crop, as a share of what is free, 0 to 1."""
    top: float
    zoom: float
    """Photograph's pixels per pixel of the picture."""
    is_flipped: bool
    brightness: float
    texture_seed: int


def sample_backdrop(rng: random.Random, split: Split) -> Backdrop:
    """Draw a background.

    Args:
        rng: the only source of chance.
        split: whose photographs it may show.
    """
    photograph = None if rng.random() < 0.2 else rng.choice(photograph_ids(split))
    left, top, zoom = rng.random(), rng.random(), rng.uniform(1.5, 4)
    return Backdrop(photograph, left, top, zoom, rng.random() < 0.5, rng.uniform(0.6, 1.1), rng.getrandbits(32))


def draw_backdrop(backdrop: Backdrop, width: int, height: int) -> Image.Image:
    """Draw it; the same background gives the same pixels.

    Args:
        backdrop: what to draw.
        width: pixels.
        height: pixels.
    Returns:
        RGB image.
    """
    if backdrop.photograph is None:
        return _texture(np.random.default_rng(backdrop.texture_seed), width, height)
    photograph = _photographs()[backdrop.photograph]
    zoom = min(backdrop.zoom, photograph.width / width, photograph.height / height)
    wide, high = min(width * zoom, photograph.width), min(height * zoom, photograph.height)  # rounding may pass them
    left, top = backdrop.left * (photograph.width - wide), backdrop.top * (photograph.height - high)
    box = (left, top, min(left + wide, photograph.width), min(top + high, photograph.height))
    crop = photograph.resize((width, height), Image.Resampling.BILINEAR, box)
    crop = ImageOps.mirror(crop) if backdrop.is_flipped else crop
    return ImageEnhance.Brightness(crop).enhance(backdrop.brightness)


@cache
def photograph_ids(split: Split) -> tuple[int, ...]:
    """Indices of the photographs that a split may show."""
    return tuple(index for index in range(len(_photographs())) if (index % 4 == 3) == (split == "held_out"))


@cache
def _photographs() -> list[Image.Image]:
    folder = packages_folder() / "shrunk"
    if not folder.is_dir():
        _shrink_all(folder)
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def _shrink_all(folder: Path) -> None:
    wallpapers = [
        *find_files("plasma-workspace-wallpapers", "usr/share/wallpapers/*/contents/images/*x*.*"),
        *find_files("gnome-backgrounds", "usr/share/backgrounds/gnome/*.webp"),
    ]
    part = folder.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    wide = {path.parents[2].name if "wallpapers" in path.parts else path.stem: path for path in wallpapers}
    wide = {name: path for name, path in wide.items() if not name.startswith("vnc")}  # those are plain colours
    for name, path in wide.items():
        _shrink(path, part / f"wallpaper-{name}.png")
    for name in _SCIKIT_IMAGE:
        with as_file(files("skimage") / "data" / f"{name}.png") as path:
            _shrink(path, part / f"scikit-image-{name}.png")
    for name in ("china", "flower"):
        with as_file(files("sklearn") / "datasets" / "images" / f"{name}.jpg") as path:
            _shrink(path, part / f"scikit-learn-{name}.png")
    part.replace(folder)


def _shrink(path: Path, target: Path) -> None:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((_LONG_SIDE, _LONG_SIDE), Image.Resampling.LANCZOS)
    image.save(target)


def _texture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Coloured noise at a few scales, or a checked pattern."""
    if rng.random() < 0.3:
        side = int(rng.integers(3, 9))
        down, across = np.mgrid[0:height, 0:width] // side
        light, dark = rng.integers(110, 230, 3), rng.integers(10, 110, 3)
        pixels = np.where(((down + across) % 2 == 0)[..., None], light, dark).astype(np.float32)
        return _as_image(pixels + rng.normal(0, 12, (height, width, 3)))
    noise: NDArray[np.float64] = np.zeros((height, width, 3)) + rng.integers(60, 180, 3)
    for scale in (2, 4, 9, 20):
        coarse = rng.normal(0, 26, (height // scale + 2, width // scale + 2, 3))
        layer = _as_image(coarse + 128).resize((width, height), Image.Resampling.BICUBIC)
        noise += np.asarray(layer, np.float64) - 128
    return _as_image(noise)


def _as_image(pixels: NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
