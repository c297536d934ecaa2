"""Visibility against transformers' own mask functions."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from trimserve.model.visibility import feature_visibility, visible_images

IMAGE = 9
CASES = [  # token ids, images seen by each row
    ([1, 2], [(0, 0), (0, 0)]),
    ([1, IMAGE, 2], [(0, 0), (0, 1), (0, 1)]),
    ([IMAGE, 1, IMAGE, 2], [(0, 1), (0, 1), (1, 2), (1, 2)]),
    ([IMAGE, IMAGE, 1, IMAGE], [(0, 1), (0, 2), (0, 2), (2, 3)]),
    ([1, IMAGE, IMAGE, IMAGE], [(0, 0), (0, 1), (0, 2), (0, 3)]),
]

prompts = st.lists(st.sampled_from([1, IMAGE]), min_size=1, max_size=24).filter(lambda ids: ids.count(IMAGE) <= 5)


def transformers_mask(token_ids: list[int], num_tiles: list[int], max_tiles: int) -> np.ndarray:
    """Whether row t sees tile i of image m: [T, images, max_tiles]."""
    sparse = get_cross_attention_token_mask(token_ids, IMAGE)
    dense = convert_sparse_cross_attention_mask_to_dense([sparse], [num_tiles], max_tiles, len(token_ids))
    return np.asarray(dense[0], dtype=bool)


@pytest.mark.parametrize(("token_ids", "expected"), CASES)
def test_rows_see_from_their_image_to_the_next_group(token_ids: list[int], expected: list[tuple[int, int]]) -> None:
    assert visible_images(token_ids, IMAGE) == expected


@given(prompts)
@example([IMAGE] * 5)
@example([1, 1, IMAGE])
@example([IMAGE, 1, IMAGE, IMAGE, 1, 1, IMAGE])
def test_visible_images_equal_transformers_mask(token_ids: list[int]) -> None:
    num_images = token_ids.count(IMAGE)
    mask = transformers_mask(token_ids, [1] * num_images, 1)[:, :, 0]
    images = np.arange(num_images)
    ours = np.array([(first <= images) & (images < end) for first, end in visible_images(token_ids, IMAGE)])
    assert np.array_equal(ours, mask)


@given(prompts, st.lists(st.integers(1, 4), min_size=5, max_size=5))
def test_feature_ranges_equal_transformers_mask_of_valid_tiles(token_ids: list[int], tiles: list[int]) -> None:
    features_per_tile = 3
    num_tiles = tiles[: token_ids.count(IMAGE)]
    mask = transformers_mask(token_ids, num_tiles, 4)
    valid = np.concatenate([mask[:, m, :count] for m, count in enumerate(num_tiles)] or [mask[:, :0, 0]], axis=1)
    expected = valid.repeat(features_per_tile, axis=1)

    num_features = [count * features_per_tile for count in num_tiles]
    visibility = feature_visibility(visible_images(token_ids, IMAGE), num_features)
    features = torch.arange(sum(num_features))
    ours = (visibility[:, :1] <= features) & (features < visibility[:, 1:])
    assert visibility.dtype == torch.int32
    assert visibility.shape == (len(token_ids), 2)
    assert np.array_equal(ours.numpy(), expected)


def test_no_rows_give_an_empty_table() -> None:
    assert feature_visibility([], [5]).shape == (0, 2)
