"""What covers each patch of an image: the labels of the auxiliary loss."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.models.mllama.image_processing_pil_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from training.examples import Example
from training.model import PATCH_SIZE
from training.scenes import COLOURS, TILE_SIZE

__all__ = ["IGNORED", "pad_patch_labels", "patch_labels"]

IGNORED = -100
"""What torch's cross entropy skips."""

_MAX_TILES = 4


def pad_patch_labels(examples: list[list[Example]]) -> tuple[Tensor, Tensor]:
    """Labels of a batch.

    Args:
        examples: B rows of as many images each.
    Returns:
        marks: int64 [B, images * 4, 64], `IGNORED` where there is no tile.
        colours: int64 [B, images * 4, 64], `IGNORED` where nothing covers the patch.
    """
    patches = (TILE_SIZE // PATCH_SIZE) ** 2
    marks = torch.full((len(examples), len(examples[0]), _MAX_TILES, patches), IGNORED)
    colours = marks.clone()
    for b, shown in enumerate(examples):
        for i, example in enumerate(shown):
            for padded, labels in zip((marks, colours), patch_labels(example), strict=True):
                padded[b, i, : len(labels)] = torch.from_numpy(labels)
    return marks.flatten(1, 2), colours.flatten(1, 2)


def patch_labels(example: Example) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """What covers the centre of each patch after image processing.

    Returns:
        marks: int64 [tiles, 64]: 0 background, else a mark's number.
        colours: int64 [tiles, 64]: index into `COLOURS`, -100 on background and where no colour is clear.
    """
    width, height = example.image.size
    canvas_height, canvas_width = get_optimal_tiled_canvas(height, width, _MAX_TILES, TILE_SIZE)
    fitted_height, fitted_width = get_image_size_fit_to_canvas(height, width, canvas_height, canvas_width, TILE_SIZE)
    scale_x, scale_y = fitted_width / example.size[0], fitted_height / example.size[1]
    rows, columns = canvas_height // PATCH_SIZE, canvas_width // PATCH_SIZE
    y = (np.arange(rows)[:, None] + 0.5) * PATCH_SIZE / scale_y
    x = (np.arange(columns)[None] + 0.5) * PATCH_SIZE / scale_x
    marks = np.zeros((rows, columns), np.int64)
    colours = np.full((rows, columns), IGNORED, np.int64)
    for mark in example.marks:
        left, top, right, bottom = mark.box
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        marks[inside] = mark.number
        colours[inside] = IGNORED if mark.colour is None else list(COLOURS).index(mark.colour)
    return _by_tile(marks), _by_tile(colours)


def _by_tile(grid: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    side = TILE_SIZE // PATCH_SIZE
    rows, columns = grid.shape
    tiles = grid.reshape(rows // side, side, columns // side, side).transpose(0, 2, 1, 3)
    return tiles.reshape(-1, side * side)
