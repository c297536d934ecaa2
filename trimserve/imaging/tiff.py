"""TIFF files that Pillow opens, but whose pixels it would read wrongly, or not at all.

Written against Pillow's `TiffImagePlugin._setup`; the tests compare pixels.
"""

from typing import Final

from PIL import TiffImagePlugin
from PIL.ExifTags import Base as ExifTag

__all__ = ["WHITE_IS_ZERO", "TiffFile"]

WHITE_IS_ZERO: Final = 0
"""A photometric interpretation."""

_ONE_PLANE: Final = 1
_PLANES: Final = 2
"""Planar configurations: the samples of a pixel lie together, or each in a plane of its own."""

_BLACK_IS_ZERO: Final = 1
# Pillow reads grey of 12 and 16 bits as it is stored, white-is-zero too, but lists it only for some byte orders.
for _order, _photometric, _fill, _bits, _modes in (
    (TiffImagePlugin.II, WHITE_IS_ZERO, 1, 12, ("I;16", "I;12")),
    (TiffImagePlugin.MM, WHITE_IS_ZERO, 1, 12, ("I;16", "I;12")),
    (TiffImagePlugin.MM, _BLACK_IS_ZERO, 1, 12, ("I;16", "I;12")),
    (TiffImagePlugin.II, WHITE_IS_ZERO, 2, 16, ("I;16", "I;16R")),
    (TiffImagePlugin.MM, WHITE_IS_ZERO, 1, 16, ("I;16B", "I;16B")),
):
    TiffImagePlugin.OPEN_INFO.setdefault((_order, _photometric, (1,), _fill, (_bits,), ()), _modes)


class TiffFile(TiffImagePlugin.TiffImageFile):
    """One whose planes are read as deep as they are.

    Pillow takes a letter of the pixels' raw mode for each plane, and loses what stands behind it: 16 bits, fewer than
    8, or white is zero.
    """

    def _setup(self) -> None:
        if self.tag_v2.get(ExifTag.SamplesPerPixel, 1) == 1:
            self.tag_v2[ExifTag.PlanarConfiguration] = _ONE_PLANE  # it makes no difference
        super()._setup()
        if self.tag_v2.get(ExifTag.PlanarConfiguration) != _PLANES or self._compression != "raw":
            return
        depths = {*self.tag_v2.get(ExifTag.BitsPerSample, (1,))}
        if depths == {16}:
            order = "L" if self.tag_v2.prefix == TiffImagePlugin.II else "B"
            self.tile = [tile._replace(args=_deep(tile.args, order)) for tile in self.tile]
        elif depths != {8}:
            raise SyntaxError(f"planes of {sorted(depths)} bits")


def _deep(args: object, order: str) -> tuple[object, ...]:
    assert isinstance(args, tuple), "of a raw tile: its raw mode, stride and orientation"
    band, *others = args
    return (f"{band};16{order}", *others)
