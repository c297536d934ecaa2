"""Emoji as other designers than Noto's draw them; only training shows them."""

import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import resvg_py
from PIL import Image

from training.sources import NPM_PACKAGES, find_files

__all__ = ["draw_emoji", "other_emoji"]

_FOLDERS: dict[str, str] = {
    "openmoji": "package/color/svg",
    "@twemoji/svg": "package",
    "ruby-gemojione": "usr/share/rubygems-integration/all/gems/gemojione-3.3.0/assets/png",
    "fluentui-emoji": "package/icons",
}
"""Package, and the folder of its pictures."""

_MISNAMED = {"grinning-face-with-smiling-eyes"}
"""Names that Fluent gives another sign than Unicode does."""

_WIDTH = 128
"""Pixels that SVG is drawn with."""


def other_emoji(signs: Sequence[str]) -> list[Path]:
    """Each sign once for every design that has it.

    Args:
        signs: one emoji each; a flag is two code points.
    Returns:
        Files of PNG or SVG; see `draw_emoji`.
    Raises:
        RuntimeError: a package cannot be had.
    """
    names = {name for sign in signs for name in _file_names(sign)}
    return [
        path
        for package, folder in _FOLDERS.items()
        for path in find_files(package, f"{folder}/**/*.{'svg' if package in NPM_PACKAGES else 'png'}")
        if path.stem.lower() in names and path.parent.name != "high-contrast"
    ]


def _file_names(sign: str) -> list[str]:
    """What files are called: by code points, and Fluent's by a short name, which is mostly Unicode's."""
    code_points = "-".join(f"{ord(point):x}" for point in sign)
    if len(sign) > 1:
        return [code_points]
    name = unicodedata.name(sign).lower().replace(" ", "-")
    return [code_points] if name in _MISNAMED else [code_points, name]


def draw_emoji(path: Path) -> Image.Image:
    """One of `other_emoji`, in RGBA.

    Args:
        path: PNG or SVG.
    """
    if path.suffix == ".png":
        return Image.open(path).convert("RGBA")
    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_path=str(path), width=_WIDTH))).convert("RGBA")
