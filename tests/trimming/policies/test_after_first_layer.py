"""Policies that look at the first cross-attention layer, each on a table worked by hand from its formula."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.trimming.policies.layers import attended, scored
from trimserve.api.trim import FixedCount, TrimRequest
from trimserve.trimming.budget import Allowance
from trimserve.trimming.plan import TrimPlan, select
from trimserve.trimming.policies.cdpruner import CDPruner
from trimserve.trimming.policies.fastv import FastV
from trimserve.trimming.policies.mean import Mean
from trimserve.trimming.policies.mmr import Mmr
from trimserve.trimming.policies.policy import AfterFirstLayer, CrossAttentionView, Verdict
from trimserve.trimming.policies.sparsevlm import SparseVLM
from trimserve.trimming.policies.tiles import quotas_by, relevance


def chosen(policy: AfterFirstLayer, layer: CrossAttentionView, count: int) -> list[int]:
    """What is kept of the only image."""
    [image] = layer.images()
    return policy.choose(image, Allowance(FixedCount(count))).kept.tolist()


TWO_ROWS = torch.tensor(
    [
        [[0.8, 0.1, 0.05, 0.05], [0.1, 0.1, 0.1, 0.7]],
        [[0.1, 0.5, 0.3, 0.1], [0.1, 0.1, 0.2, 0.6]],
    ]
)


def test_mean_averages_over_heads_and_rows() -> None:
    assert chosen(Mean(), attended(TWO_ROWS), 2) == [0, 3]  # 0.275 0.2 0.1625 0.3625


def test_fastv_asks_the_last_row_only() -> None:
    assert chosen(FastV(), attended(TWO_ROWS), 2) == [1, 3]  # 0.1 0.3 0.25 0.35


def test_fastv_asks_the_last_row_that_sees_the_image() -> None:
    weights = torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.2, 0.7]], [[0.2, 0.7, 0.1]]])
    layer = attended(weights)
    layer.visibility[2] = 0  # the last row sees nothing
    assert chosen(FastV(), layer, 1) == [2]


def test_sparsevlm_asks_the_rows_that_are_relevant_above_average() -> None:
    weights = torch.tensor([[[0.6, 0.2, 0.2]], [[0.1, 0.1, 0.8]], [[0.3, 0.3, 0.4]]])
    # Of each feature's column the rows have (0.6 0.1 0.3), (0.33 0.17 0.5), (0.14 0.57 0.29): on average 0.36, 0.28
    # and 0.36. Rows 0 and 2 are raters and give 0.45 0.25 0.3.
    assert chosen(SparseVLM(), attended(weights), 1) == [0]
    assert chosen(Mean(), attended(weights), 1) == [2]


def test_sparsevlm_asks_every_row_where_all_are_alike() -> None:
    weights = torch.tensor([[[0.2, 0.5, 0.3]]]).expand(7, 3, 3)
    assert chosen(SparseVLM(), attended(weights), 1) == [1]


@pytest.mark.parametrize(("ratio", "kept"), [(0.3, [0]), (0.34, [0, 2]), (0.67, [0, 1, 2])])
def test_a_cascade_of_sparsevlm_asks_a_later_layers_own_raters(ratio: float, kept: list[int]) -> None:
    weights = torch.tensor([[[0.6, 0.2, 0.2]], [[0.1, 0.1, 0.8]], [[0.3, 0.3, 0.4]]])
    view = attended(weights)  # 0.45 0.25 0.3, as above
    view.layer = 1
    choices = SparseVLM(cascade_ratio=ratio).after_layer(view, Allowance(FixedCount(3)))
    assert not isinstance(choices, Verdict)
    assert [choice.kept.tolist() for choice in choices] == [kept]


def twenty_in_two_places() -> CrossAttentionView:
    """A layer that looks at feature n the less the larger n is; keys 0 to 10 are alike, and 11 to 19."""
    layer = attended(torch.arange(20, 0, -1)[None, None].float().softmax(dim=2))
    place = (torch.arange(20) > 10).float()[:, None, None]
    layer.keys = torch.cat([layer.keys, 1e4 * place, 1e4 - 1e4 * place], dim=2)
    layer.queries = F.pad(layer.queries, (0, 2))
    return layer


@pytest.mark.parametrize(
    ("ratio", "count", "kept", "groups"),
    [
        (0.3, 4, 4, []),  # 0.48 means
        (0.4, 4, 3, [range(3, 10)]),  # 0.64 means, of 0.4 * 17 features
        (1.0, 4, 2, [range(2, 11), range(11, 20)]),  # 1.6 means
        (1.0, 2, 1, [range(1, 20)]),  # 1.8 means, but a feature stays
        (1.0, 1, 1, []),
        (1.0, 20, 20, []),
    ],
)
def test_sparsevlm_recycles_the_best_that_it_drops_within_its_budget(
    ratio: float, count: int, kept: int, groups: list[range]
) -> None:
    [image] = twenty_in_two_places().images()
    choice = SparseVLM(recycle_ratio=ratio).choose(image, Allowance(FixedCount(count)))
    assert choice.kept.tolist() == list(range(kept))
    assert choice.groups is not None
    members = choice.groups.members.split(choice.groups.sizes.tolist())
    assert [part.tolist() for part in members] == [list(group) for group in groups]


def test_sparsevlm_drops_what_it_does_not_recycle_whatever_merge_ratio_says() -> None:
    request = TrimRequest(policy="sparsevlm", budget=FixedCount(4), merge_ratio=0.5)
    recycling = replace(request, parameters={"recycle_ratio": 0.4})
    selection = select(twenty_in_two_places(), TrimPlan.of(recycling))
    assert selection.groups is not None
    assert selection.groups.sizes.tolist() == [7]
    merged = select(twenty_in_two_places(), TrimPlan.of(request)).groups
    assert merged is not None
    assert merged.sizes.sum() == 16


# Relevance 1, 6/7, 3/7 and 0; feature 1 is a copy of 0, 2 is at right angles to it and 3 is its opposite.
SCORES = torch.tensor([[0.4, 0.35, 0.2, 0.05]])
FOUR = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])


@pytest.mark.parametrize(
    ("weight", "kept"),
    [
        (1.0, [0, 1]),
        (0.8, [0, 1]),  # 0.49 for 1, 0.34 for 2, 0.2 for 3
        (0.5, [0, 3]),  # -0.07, 0.21, 0.5
        (0.0, [0, 3]),
    ],
)
def test_mmr_weighs_relevance_against_the_nearest_that_is_kept(weight: float, kept: list[int]) -> None:
    assert chosen(Mmr(relevance_weight=weight), scored(SCORES, (4,), FOUR), 2) == kept


@pytest.mark.parametrize(
    ("power", "count", "kept"),
    [
        (1.0, 1, [0]),
        (1.0, 2, [0, 2]),  # a copy adds nothing; 2 adds (3/7)^2, and 3 has no relevance
        (1.0, 3, [0, 1, 2]),  # nothing adds anything any more: the more relevant
        (0.0, 2, [0, 2]),  # relevance plays no part, and neither does the sign of the cosine
        (0.0, 3, [0, 1, 2]),
    ],
)
def test_cdpruner_multiplies_relevance_and_diversity(power: float, count: int, kept: list[int]) -> None:
    assert chosen(CDPruner(relevance_power=power), scored(SCORES, (4,), FOUR), count) == kept


def drawn(tiles: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores [3, N] and features [N, 8]."""
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(3, tiles * size, generator=rng), torch.randn(tiles * size, 8, generator=rng)


@pytest.mark.parametrize("seed", range(3))
def test_cdpruner_is_the_literal_greedy_maximum_of_the_determinant(seed: int) -> None:
    scores, features = drawn(2, 9, seed)
    layer = scored(scores, (18,), features)
    layer.features_per_tile = 9
    quality = relevance(scores).double()
    directions = F.normalize(features.double(), dim=1)
    expected: list[int] = []
    for tile, quota in enumerate(quotas_by(quality, 9, 9)):
        own = range(9 * tile, 9 * tile + 9)
        kept: list[int] = []
        for _ in range(quota):
            rows = {n: quality[[*kept, n], None] * directions[[*kept, n]] for n in own if n not in kept}
            kept.append(max(rows, key=lambda n: float(torch.linalg.det(rows[n] @ rows[n].T))))
        expected += kept
    assert chosen(CDPruner(), layer, 9) == sorted(expected)


def test_tiles_share_what_is_kept_by_their_relevance() -> None:
    layer = scored(torch.tensor([[0.3, 0.2, 0.25, 0.01, 0.15, 0.02]]), (6,), torch.eye(6))
    layer.features_per_tile = 3
    for policy in (Mmr(), CDPruner()):
        assert chosen(policy, layer, 4) == [0, 1, 2, 4]  # all of tile 0 and the best of tile 1
