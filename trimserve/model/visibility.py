"""Which visual features each text row sees, by the rule of transformers' Mllama processor.

An image is seen from its `<|image|>` on until the next one; adjacent images are seen together. So the images
that a row sees are consecutive, and what it sees is one range of features. It knows nothing about pixels.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

__all__ = ["feature_visibility", "visible_images"]


def visible_images(token_ids: Sequence[int], image_token_id: int) -> list[tuple[int, int]]:
    """Find the images that each text row sees.

    Args:
        token_ids: the prompt, T ids.
        image_token_id: id of `<|image|>`; the i-th occurrence stands for image i.
    Returns:
        For each of the T rows the half-open range of images it sees; (0, 0) before the first image.
    """
    ranges = []
    first = end = 0
    previous_is_image = False
    for token_id in token_ids:
        is_image = token_id == image_token_id
        if is_image:
            first = first if previous_is_image else end
            end += 1
        ranges.append((first, end))
        previous_is_image = is_image
    return ranges


def feature_visibility(image_ranges: Sequence[tuple[int, int]], num_features_per_image: Sequence[int]) -> Tensor:
    """Turn ranges of images into ranges of features, which lie one image after the other.

    Args:
        image_ranges: half-open range of images for each of T rows.
        num_features_per_image: features of each image, in order.
    Returns:
        int32 [T, 2] on the CPU, half-open range of features for each row; empty where the range of images is.
    """
    offsets = np.array([0, *accumulate(num_features_per_image)], dtype=np.int32)
    return torch.from_numpy(offsets[np.array(image_ranges, dtype=np.int64).reshape(-1, 2)])
