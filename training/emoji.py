"""Emoji as other designers than Noto's draw them; only training shows them.

Needs resvg-py, which draws SVG: `pip install resvg-py==0.5.0`.
"""

import io
import unicodedata
from pathlib import Path

from PIL import Image

from training.sources import NPM_PACKAGES, find_files

__all__ = ["other_emoji"]

_FOLDERS: dict[str, str] = {
    "openmoji": "package/color/svg",
    "@twemoji/svg": "package",
    "ruby-gemojione": "usr/share/rubygems-integration/all/gems/gemojione-3.3.0/assets/png",
    "fluentui-emoji": "package/icons",
}
"""Package, and the folder of its pictures."""

_WIDTH = 128
"""Pixels that SVG is drawn with."""


def other_emoji(signs: list[str]) -> list[Image.Image]:
    """Each sign once for every design that has it.

    Args:
        signs: one emoji each; a flag is two code points.
    Raises:
        RuntimeError: a package cannot be had.
    """
    names = {name for sign in signs for name in _file_names(sign)}
    files = [
        path
        for package, folder in _FOLDERS.items()
        for path in find_files(package, f"{folder}/**/*.{'svg' if package in NPM_PACKAGES else 'png'}")
        if path.stem.lower() in names and path.parent.name != "high-contrast"
    ]
    return [_draw(path) for path in files]


def _file_names(sign: str) -> tuple[str, str]:
    """What files are called: by code points, and by the name of the first, which Fluent's do where it is short."""
    return "-".join(f"{ord(point):x}" for point in sign), unicodedata.name(sign[0]).lower().replace(" ", "-")


def _draw(path: Path) -> Image.Image:
    if path.suffix == ".png":
        return Image.open(path).convert("RGBA")
    import resvg_py  # nothing else needs it

    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_path=str(path), width=_WIDTH))).convert("RGBA")
