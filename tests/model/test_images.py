"""RGB into tiles."""

import numpy as np
import pytest
import torch
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from trimserve.api.prompt import Region
from trimserve.model.images import crop, prepare_image

TILE = 28
GRIDS = [  # width, height, (tiles high, tiles wide), (content height, content width)
    (28, 28, (1, 1), (28, 28)),
    (1, 1, (1, 1), (28, 28)),
    (56, 28, (1, 2), (28, 56)),
    (28, 56, (2, 1), (56, 28)),
    (500, 500, (2, 2), (56, 56)),
    (500, 400, (2, 2), (44, 56)),
    (1, 10000, (4, 1), (112, 1)),
    (10000, 1, (1, 4), (1, 112)),
    (3, 3, (1, 1), (28, 28)),
    (10000, 3, (1, 4), (1, 112)),
]


@pytest.fixture(scope="module")
def processor() -> MllamaImageProcessorPil:
    return MllamaImageProcessorPil(size={"height": TILE, "width": TILE}, max_image_tiles=4)


@pytest.mark.parametrize(("width", "height", "grid", "content"), GRIDS)
def test_tile_grid_and_content_of_any_shape(
    processor: MllamaImageProcessorPil,
    width: int,
    height: int,
    grid: tuple[int, int],
    content: tuple[int, int],
) -> None:
    prepared = prepare_image(np.full((height, width, 3), 255, np.uint8), processor)
    assert (prepared.tiles_high, prepared.tiles_wide) == grid
    assert (prepared.content_height, prepared.content_width) == content
    assert prepared.num_tiles == grid[0] * grid[1]
    assert prepared.pixel_values.shape == (4, 3, TILE, TILE)
    assert prepared.pixel_values.dtype == torch.float32
    assert not prepared.pixel_values[prepared.num_tiles :].any()

    # white content is positive after normalisation, padding of the canvas (black) negative
    tiles = prepared.pixel_values[: prepared.num_tiles, 0].reshape(*grid, TILE, TILE)
    canvas = tiles.transpose(1, 2).reshape(grid[0] * TILE, grid[1] * TILE)
    expected = torch.zeros_like(canvas, dtype=torch.bool)
    expected[: content[0], : content[1]] = True
    assert torch.equal(canvas > 0, expected)


def test_aspect_ratio_ids_count_supported_grids_from_one(processor: MllamaImageProcessorPil) -> None:
    supported = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    for index, (tiles_high, tiles_wide) in enumerate(supported):
        prepared = prepare_image(np.zeros((tiles_high * TILE, tiles_wide * TILE, 3), np.uint8), processor)
        assert (prepared.tiles_high, prepared.tiles_wide) == (tiles_high, tiles_wide)
        assert prepared.aspect_ratio_id == index + 1


REGIONS = [  # of an image of 10 rows and 4 columns: region, first and end row, first and end column
    (Region(0, 0, 1, 1), (0, 10), (0, 4)),
    (Region(0.5, 0.5, 0.5, 0.5), (5, 10), (2, 4)),
    (Region(0.25, 0, 0.5, 0.5), (2, 8), (0, 2)),
    (Region(0.999, 0.999, 0.001, 0.001), (9, 10), (3, 4)),
    (Region(0, 0, 1e-9, 1e-9), (0, 1), (0, 1)),
]


@pytest.mark.parametrize(("region", "rows", "columns"), REGIONS)
def test_a_region_is_whole_pixels_and_at_least_one(
    region: Region, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    pixels = np.arange(10 * 4 * 3, dtype=np.uint8).reshape(10, 4, 3)
    assert np.array_equal(crop(pixels, region), pixels[slice(*rows), slice(*columns)])
