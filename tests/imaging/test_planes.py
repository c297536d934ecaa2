"""TIFF files whose samples lie in planes of their own are read as deep as they are."""

import io
import struct
from typing import Any, Literal

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from tests.imaging.kinds import photograph
from trimserve.imaging.decode import decode_pixels

ByteOrder = Literal["<", ">"]


def tiff(samples: NDArray[Any], byteorder: ByteOrder, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, samples, byteorder=byteorder, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> NDArray[np.uint8]:
    return decode_pixels(data, "images[0]", 10**6)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("options", [{}, {"rowsperstrip": 7}, {"tile": (16, 16)}, {"compression": "zlib"}], ids=str)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_planes_of_8_and_16_bits_show_the_same(kind: Any, options: dict[str, Any], byteorder: ByteOrder) -> None:
    planes = np.moveaxis(photograph().astype(kind) * (np.iinfo(kind).max // 255), -1, 0)
    data = tiff(planes, byteorder, photometric="rgb", planarconfig="separate", **options)
    assert np.array_equal(decoded(data), photograph())


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_a_plane_of_alpha_is_shown_over_white(byteorder: ByteOrder) -> None:
    planes = np.moveaxis(np.dstack([photograph(), np.zeros(photograph().shape[:2], np.uint8)]), -1, 0)
    options: dict[str, Any] = {"photometric": "rgb", "planarconfig": "separate", "extrasamples": ["unassalpha"]}
    assert (decoded(tiff(planes.astype(np.uint16) * 257, byteorder, **options)) == 255).all()


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("photometric", ["miniswhite", "minisblack"])
@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.uint16])
def test_of_one_plane_it_makes_no_difference_that_planes_are_apart(
    kind: Any, photometric: str, byteorder: ByteOrder
) -> None:
    grey = photograph()[..., 0]
    samples = grey > 127 if kind is np.bool_ else grey.astype(kind) * (np.iinfo(kind).max // 255)
    # tifffile does not write the tag itself, so one that means nothing becomes it.
    other, planes_apart = (struct.pack(f"{byteorder}HHIHH", tag, 3, 1, 2, 0) for tag in (285, 284))
    data = tiff(samples, byteorder, photometric=photometric, extratags=[(285, "H", 1, 2, True)])
    assert data.count(other) == 1
    black_is_zero = np.where(grey > 127, 255, 0) if kind is np.bool_ else grey
    shown = 255 - black_is_zero if photometric == "miniswhite" else black_is_zero
    assert np.array_equal(decoded(data.replace(other, planes_apart))[..., 0], shown)
