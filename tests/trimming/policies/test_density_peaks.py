"""Groups around density peaks: hand-worked, and against a literal reading."""

import math

import pytest
import torch
from torch import Tensor

from trimserve.trimming.policies.density_peaks import around_density_peaks, group_members


def directions(*degrees: float) -> Tensor:
    """Rows [R, 2] that point there, of several lengths."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, len(degrees) + 1)[:, None]


# Squared distances: 0.03 between 0 and 10 degrees, then 1.65 and 1.32 to 80, 3.88, 3.97 and 3 to 200. Their means are
# 1.85 1.77 1.99 3.62, so densities are 0.157 0.170 0.137 0.027; times 0.17, 1.99, 1.15 and 1.73 that is 0.03, 0.34,
# 0.16 and 0.05.
PEAKS = [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (3, [0, 0, 1, 2]), (4, [0, 1, 2, 3])]


@pytest.mark.parametrize(("num_groups", "groups"), PEAKS)
def test_peaks_are_dense_and_far_from_what_is_denser(num_groups: int, groups: list[int]) -> None:
    assert around_density_peaks(directions(0, 10, 80, 200), num_groups).tolist() == groups


def literal(rows: Tensor, num_groups: int) -> list[int]:
    """The formula of the docstring, number by number."""
    unit = [(row / row.norm()).tolist() for row in rows.double()]
    count = range(len(unit))
    distance = [[math.dist(one, other) for other in unit] for one in unit]
    nearest = [sorted(distance[n][m] for m in count if m != n)[:5] for n in count]
    density = [math.exp(-sum(d * d for d in each) / len(each)) for each in nearest]
    apart = [min((distance[n][m] for m in count if density[m] > density[n]), default=max(distance[n])) for n in count]
    centres = sorted(sorted(count, key=lambda n: -density[n] * apart[n])[:num_groups])
    return [min(range(num_groups), key=lambda group: distance[n][centres[group]]) for n in count]


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_those_of_a_literal_reading(seed: int) -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
    for num_groups in (1, 3, 12, 40):
        assert around_density_peaks(rows, num_groups).tolist() == literal(rows, num_groups)


def test_the_lower_index_wins_where_rows_are_equal() -> None:
    assert around_density_peaks(torch.ones(6, 3), 3).tolist() == [0, 1, 2, 0, 0, 0]
    assert around_density_peaks(torch.ones(1, 3), 1).tolist() == [0]


def test_rows_that_are_no_numbers_are_members_like_others() -> None:
    rows = directions(0, 1, 2, 120, 121, 122, 240)
    rows[6] = math.nan
    assert around_density_peaks(rows, 3).tolist() == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("num_groups", "members"),
    [
        (0, []),
        (1, [[0, 1, 2, 3, 4, 5]]),  # tile 1 is left without
        (2, [[0, 1, 2], [3, 4, 5]]),
        (3, [[0, 1, 2], [3, 4, 5], [16, 17]]),  # 2.25 for tile 0, the rest for tile 1
        (8, [[0], [1], [2], [3], [4], [5], [16], [17]]),
    ],
)
def test_tiles_share_groups_as_they_share_members(num_groups: int, members: list[list[int]]) -> None:
    keys = directions(*[0] * 3, *[90] * 7, *[0] * 10).view(20, 2, 1)
    is_member = torch.zeros(20, dtype=torch.bool)
    is_member[[0, 1, 2, 3, 4, 5, 16, 17]] = True
    groups = group_members(keys, is_member, 10, num_groups)
    assert [part.tolist() for part in groups.members.split(groups.sizes.tolist())] == members
    assert groups.num_groups == (num_groups,)
