"""Groups of dropped features, their means and what they cost nobody: hand-worked, and against a literal reading."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.model.peer import literal_groups
from trimserve.trimming.budget import budget
from trimserve.trimming.merging import Groups, group_dropped


def members_of(groups: Groups) -> list[list[int]]:
    """The members of each group."""
    return [part.tolist() for part in groups.members.split(groups.sizes.tolist())]


def random_keys(num_features: int, seed: int = 0) -> Tensor:
    """Keys [N, 2, 4] without a tie."""
    return torch.randn(num_features, 2, 4, generator=torch.Generator().manual_seed(seed))


TILE = [  # keys, and the degrees of their directions
    (0.0, 1.0),  # 90, kept
    (9.0, 1.0),  # 6
    (1.0, 1.0),  # 45
    (2.0, 9.0),  # 77
    (-1.0, 7.0),  # 98
    (-3.0, 1.0),  # 162
]
CASES = [  # merge_ratio, groups
    (1 / 6, [[1, 2, 3, 4, 5]]),
    (2 / 6, [[4, 5], [1, 2, 3]]),  # 5 is furthest from the mean, which is at 76; 1 is furthest from 5
    (3 / 6, [[5], [1], [2, 3, 4]]),  # 3 is 71 from its nearest anchor, 4 is 63 and 2 is 39
    (4 / 6, [[5], [1], [3, 4], [2]]),
    (5 / 6, [[5], [1], [3], [2], [4]]),
    (6 / 6, [[5], [1], [3], [2], [4]]),  # no more groups than dropped features
]


@pytest.mark.parametrize(("merge_ratio", "groups"), CASES)
def test_groups_gather_around_anchors_that_are_far_apart(merge_ratio: float, groups: list[list[int]]) -> None:
    keys = torch.tensor(TILE)[:, None]
    found = group_dropped(keys, torch.tensor([0]), (6,), 6, merge_ratio)
    assert members_of(found) == groups
    assert found.num_groups == (len(groups),)


def test_groups_become_means_whose_weight_is_their_size() -> None:
    rows = torch.tensor([[0.0, 4.0], [1.0, 8.0], [5.0, 0.0], [7.0, 1.0]])
    groups = Groups(torch.tensor([1, 2, 0]), torch.tensor([2, 1]), (2,))
    assert groups.mean(rows).tolist() == [[3.0, 4.0], [0.0, 4.0]]
    assert groups.mean(rows.view(4, 2, 1)).tolist() == [[[3.0], [4.0]], [[0.0], [4.0]]]


def test_equal_features_come_to_as_many_groups_as_others_do() -> None:
    groups = group_dropped(torch.ones(8, 2, 3), torch.tensor([1, 6]), (8,), 8, 0.375)
    # Which of them are the anchors is a matter of rounding.
    assert sorted(groups.members.tolist()) == [0, 2, 3, 4, 5, 7]
    assert sorted(groups.sizes.tolist()) == [1, 1, 4]


def test_anchors_are_those_of_a_literal_reading_where_there_are_more_features_than_candidates() -> None:
    keys = torch.randn(700, 2, 16, generator=torch.Generator().manual_seed(0))
    keys[300:500] = keys[:1] + 0.1 * keys[300:500]  # alike
    groups = group_dropped(keys, torch.tensor([0]), (700,), 700, 0.3)
    assert sorted(members_of(groups)) == sorted(literal_groups(keys.flatten(1), list(range(1, 700)), 210))


@pytest.mark.parametrize("keys", [torch.eye(200), torch.eye(30).repeat(7, 1)], ids=["as unlike", "many equal"])
def test_the_lower_index_is_the_next_anchor_where_more_features_than_candidates_are_tied(keys: Tensor) -> None:
    groups = group_dropped(keys[:, None], torch.tensor([0]), (len(keys),), len(keys), 0.1)
    expected = literal_groups(keys, list(range(1, len(keys))), budget(0.1, len(keys)))
    assert members_of(groups) == expected


def test_a_tile_that_drops_nothing_has_no_group_and_one_that_drops_little_has_no_more() -> None:
    kept = torch.tensor([0, 1, 2, 3, 4, 6, 8])  # of tile 0 all, of tile 1 two, of tile 2 one
    groups = group_dropped(random_keys(12), kept, (4, 8), 4, 0.75)
    assert sorted(members_of(groups)[:2]) == [[5], [7]]
    assert sorted(groups.members[2:].tolist()) == [9, 10, 11]
    assert groups.num_groups == (0, 5)


def test_nothing_dropped_is_no_group() -> None:
    groups = group_dropped(random_keys(8), torch.arange(8), (8,), 4, 0.5)
    assert (members_of(groups), groups.num_groups) == ([], (0,))
    assert groups.mean(torch.ones(8, 2, 3)).shape == (0, 2, 3)


def test_bfloat16_keys_are_grouped_as_the_same_keys_in_float32_and_means_are_rounded_once() -> None:
    keys = random_keys(64).bfloat16()
    kept = torch.arange(0, 64, 5)
    groups, same = (group_dropped(each, kept, (64,), 32, 0.2) for each in (keys, keys.float()))
    assert members_of(groups) == members_of(same)
    assert groups.mean(keys).dtype == torch.bfloat16
    assert torch.equal(groups.mean(keys), same.mean(keys.float()).bfloat16())


@given(
    tiles=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    per_tile=st.integers(2, 12),
    kept_share=st.floats(0, 1),
    merge_ratio=st.floats(0.01, 1),
    seed=st.integers(0, 2**31),
)
def test_every_dropped_feature_is_in_the_group_that_a_literal_reading_puts_it_in(
    tiles: list[int], per_tile: int, kept_share: float, merge_ratio: float, seed: int
) -> None:
    keys = random_keys(sum(tiles) * per_tile, seed)
    is_kept = torch.rand(len(keys), generator=torch.Generator().manual_seed(seed)) < kept_share
    groups = group_dropped(keys, is_kept.nonzero()[:, 0], [n * per_tile for n in tiles], per_tile, merge_ratio)

    assert sorted(groups.members.tolist()) == (~is_kept).nonzero()[:, 0].tolist()
    most = budget(merge_ratio, per_tile)
    expected = []
    for start in range(0, len(keys), per_tile):
        dropped = [n for n in range(start, start + per_tile) if not is_kept[n]]
        expected.append(literal_groups(keys.flatten(1), dropped, most))
    found = iter(members_of(groups))
    for tile in expected:
        # Two features are as far from their mean: which of them is the first anchor is a matter of rounding.
        assert sorted(next(found) for _ in tile) == sorted(tile)
    assert next(found, None) is None
    per_image = iter(len(tile) for tile in expected)
    assert groups.num_groups == tuple(sum(next(per_image) for _ in range(n)) for n in tiles)


def test_an_image_is_grouped_beside_others_as_alone() -> None:
    keys, counts = random_keys(9 * 16), (32, 16, 64, 32)
    kept = torch.arange(0, len(keys), 7)
    together = iter(members_of(group_dropped(keys, kept, counts, 16, 0.25)))
    start = 0
    for n in counts:
        of_image = kept[(kept >= start) & (kept < start + n)] - start
        alone = members_of(group_dropped(keys[start : start + n], of_image, (n,), 16, 0.25))
        assert [[member - start for member in next(together)] for _ in alone] == alone
        start += n
