"""Policies that look at the image alone, each on a table worked by hand from its formula."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trimserve.api.trim import Budget, FixedCount, FixedRatio, Knee, TopP
from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import EncodedImage, Observation
from trimserve.trimming.policies.cls import Cls
from trimserve.trimming.policies.codebook import Codebook
from trimserve.trimming.policies.divprune import DivPrune
from trimserve.trimming.policies.gprune import GPrune
from trimserve.trimming.policies.policy import BeforeDecoder
from trimserve.trimming.policies.pool import Pool
from trimserve.trimming.policies.todre import ToDRE
from trimserve.trimming.policies.topv import TopV
from trimserve.trimming.policies.vflowopt import VFlowOpt
from trimserve.trimming.policies.visiondrop import VisionDrop
from trimserve.trimming.policies.vispruner import VisPruner


def directions(*degrees: float) -> Tensor:
    """Features [N, 2] that point there, of length 1."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def image(features: Tensor, *class_attention: list[float], tiles: int = 1, local: int = 2) -> EncodedImage:
    """An image with the class tokens' attention in each vision layer."""
    return EncodedImage(features, len(features) // tiles, local, {"class_attention": torch.tensor(class_attention)})


def kept(policy: BeforeDecoder, encoded: EncodedImage, budget: Budget | int) -> list[int]:
    """What stays as it is."""
    asked = FixedCount(budget) if isinstance(budget, int) else budget
    return policy.choose(encoded, Allowance(asked)).kept.tolist()


def groups(policy: BeforeDecoder, encoded: EncodedImage, count: int) -> list[list[int]]:
    """What is averaged."""
    found = policy.choose(encoded, Allowance(FixedCount(count))).groups
    assert found is not None
    return [part.tolist() for part in found.members.split(found.sizes.tolist())]


LAYERS = ([0.9, 0.1, 0.0, 0.0], [0.0, 0.3, 0.4, 0.3], [0.0, 0.1, 0.3, 0.6], [0.0, 0.7, 0.2, 0.1])


@pytest.mark.parametrize(
    ("policy", "local", "expected"),
    [
        (Cls(num_layers=1), 3, [0, 2]),  # the last but one of the local layers, the second
        (Cls(num_layers=1), 4, [0, 3]),
        (Cls(num_layers=1, layer=4), 3, [0, 1]),
        (Cls(num_layers=1, layer=99), 3, [0, 1]),
        (Cls(num_layers=2, layer=3), 3, [0, 3]),  # 0.4 0.7 0.9
        (Cls(num_layers=9, layer=4), 3, [0, 1]),  # 1.2 0.9 1.0
        (Cls(num_layers=1), 1, [0, 1]),
    ],
)
def test_cls_sums_layers_and_a_class_token_scores_as_its_best_patch(
    policy: Cls, local: int, expected: list[int]
) -> None:
    assert kept(policy, image(torch.zeros(4, 1), *LAYERS, local=local), 2) == expected


def test_cls_compares_tiles_with_each_other() -> None:
    encoded = image(torch.zeros(6, 1), [0.9, 0.1, 0.2, 0.9, 0.5, 0.3], tiles=2)
    assert kept(Cls(), encoded, 3) == [3, 4, 5]  # 0.2 0.1 0.2 | 0.5 0.5 0.3
    assert kept(Cls(), encoded, Knee()) == [3, 4]


def test_vispruner_takes_half_by_attention_and_thins_out_the_rest() -> None:
    encoded = image(directions(0, 90, 10, 12, 80, 60, 200), [0.0, 0.0, 0.1, 0.2, 0.0, 0.5, 0.1])
    # By attention: 5 and, scoring as high, the class token. The rest: 1 2 3 4 6 at 90 10 12 80 200 degrees. Even ones,
    # 1 3 6, compared with 2 and 4: 3 is 2 degrees from 2, 1 is 10 from 4, and 6 is far; 3 and 1 go, and 2 4 6 stay.
    assert kept(VisPruner(important_ratio=0.4), encoded, 5) == [0, 2, 4, 5, 6]


def test_vispruner_thins_out_until_the_quota_is_reached() -> None:
    degrees = [0.0, *range(0, 320, 10)]
    encoded = image(directions(*degrees), [1 / 33] * 33)
    chosen = kept(VisPruner(important_ratio=0.0), encoded, 5)
    assert len(chosen) == 5
    assert max(b - a for a, b in zip(chosen, [*chosen[1:], 33], strict=True)) <= 16


def test_vispruner_by_attention_alone_is_cls_of_each_tile() -> None:
    encoded = image(torch.randn(8, 2), [0.0, 0.3, 0.1, 0.2, 0.0, 0.1, 0.2, 0.1], tiles=2)
    assert kept(VisPruner(important_ratio=1.0), encoded, 5) == [0, 1, 3, 4, 6]


def test_gprune_gathers_weight_along_edges() -> None:
    features = directions(0, 0, 0, 90) * torch.tensor([[1.0], [2.0], [3.0], [2.5]])
    # 0 1 2 are alike and share 6 evenly, 2 each, over a degree of 3; 3 keeps its own 2.5 over 1.
    assert kept(GPrune(), image(features), 1) == [3]
    assert kept(GPrune(), image(features), 2) == [0, 3]
    # Where everything is a neighbour, at a temperature that makes all alike, all gather the same.
    assert kept(GPrune(threshold=-1.0, temperature=10.0), image(directions(0, 0, 0, 0)), 2) == [0, 1]


def test_gprune_hops_and_temperature_decide_how_far_weight_goes() -> None:
    features = directions(0, 50, 100) * torch.tensor([[1.0], [1.0], [4.0]])
    cos = math.cos(math.radians(50))
    weight = 1 / (1 + math.exp(-(1 - cos)))  # of an end on itself, at temperature 1; the rest goes to the middle
    to_end = 1 / (1 + 1 / math.exp(cos - 1) + 1)  # of the middle on each end
    after_one = [weight + to_end, (1 - weight) * 5 + (1 - 2 * to_end), 4 * weight + to_end]
    scores = [after_one[0] / 2, after_one[1] / 3, after_one[2] / 2]
    best = scores.index(max(scores))
    assert kept(GPrune(temperature=1.0, hops=1), image(features), 1) == [best] == [2]
    assert kept(GPrune(temperature=1.0, hops=1), image(features), 2) == sorted(
        sorted(range(3), key=lambda n: -scores[n])[:2]
    )


def test_divprune_takes_what_is_furthest_from_the_nearest() -> None:
    encoded = image(directions(0, 10, 100, 110, 230))
    assert kept(DivPrune(), encoded, 1) == [4]  # the others have a neighbour at 10 degrees
    assert kept(DivPrune(), encoded, 2) == [1, 4]  # 140 degrees from it; 0 is 130 away and 2 is, too
    assert kept(DivPrune(), encoded, 3) == [1, 3, 4]  # 3 is 100 from 1, 2 is 90


def test_todre_takes_what_is_furthest_from_all_together() -> None:
    encoded = image(directions(0, 10, 100, 110, 230))
    # Sums of 1 - cos: 5.16 for 0, 4.81 for 1, 4.67 for 2, 5.01 for 3, 6.86 for 4.
    assert kept(ToDRE(), encoded, 1) == [4]
    assert kept(ToDRE(), encoded, 2) == [1, 4]  # 140 degrees from it
    assert kept(ToDRE(), encoded, 3) == [1, 3, 4]  # 1.17 + 1.5 for 3, 1 + 1.64 for 2, 0.02 + 1.64 for 0


def test_tiles_have_even_quotas_and_are_compared_within() -> None:
    encoded = image(directions(0, 10, 100, 230, 0, 10, 100, 230), tiles=2)
    for policy in (DivPrune(), ToDRE()):
        chosen = kept(policy, encoded, 5)
        alone = [kept(policy, image(directions(0, 10, 100, 230)), count) for count in (3, 2)]
        assert chosen == [*alone[0], *(4 + n for n in alone[1])]


def test_visiondrop_keeps_the_best_and_averages_the_rest_around_spaced_anchors() -> None:
    encoded = image(directions(0, 90, 10, 12, 80, 60, 200), [0.0, 0.0, 0.1, 0.2, 0.0, 0.5, 0.1])
    policy = VisionDrop(contextual_ratio=0.5)
    assert kept(policy, encoded, 4) == [0, 5]
    # 1 2 3 4 6 at 90 10 12 80 200 degrees, anchors 1 and 3: 2 joins 3, and 4 and 6 join 1.
    assert groups(policy, encoded, 4) == [[1, 4, 6], [2, 3]]
    assert policy.choose(encoded, Allowance(FixedRatio(1.0))).kept.tolist() == list(range(7))


def test_visiondrop_without_means_is_vispruner_by_attention_alone() -> None:
    encoded = image(torch.randn(8, 2), [0.0, 0.3, 0.1, 0.2, 0.0, 0.1, 0.2, 0.1], tiles=2)
    choice = VisionDrop(contextual_ratio=0.0).choose(encoded, Allowance(FixedCount(5)))
    assert choice.kept.tolist() == kept(VisPruner(important_ratio=1.0), encoded, 5)
    assert choice.groups is None  # so that merge_ratio may have the rest


def looking(weights: Tensor, entropy: list[float]) -> EncodedImage:
    """An image of one tile whose features have these attention weights in the vision layer, [heads, N, N]."""
    num_heads, num_features, _ = weights.shape
    width = num_features**0.5  # takes back what queries and keys are scaled by
    queries = torch.eye(num_features)[:, None].expand(-1, num_heads, -1) * width
    keys = weights.log().permute(2, 0, 1)
    observed: dict[Observation, Tensor] = {
        "vision_attention": torch.stack([queries, keys]),
        "patch_entropy": torch.tensor(entropy),
    }
    return EncodedImage(torch.zeros(num_features, 1), num_features, 2, observed)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # Received on average: 0.4 0.21 0.19 0.2, so 0 is the only one above 1.5 / 4, and it looks at 2 and 3.
        (VFlowOpt(global_threshold=1.5), [2, 3]),
        (VFlowOpt(global_threshold=30.0), [2, 3]),  # nobody is: the one that receives most
        (VFlowOpt(global_threshold=0.0), [0, 1]),  # all are, and the scores are what is received
        (VFlowOpt(global_threshold=1.5, entropy_weight=0.5), [1, 3]),  # adds 0.36 to 1 and 0.05 to the others
    ],
)
def test_vflowopt_asks_those_that_receive_most(policy: VFlowOpt, expected: list[int]) -> None:
    head = torch.tensor([[0.1, 0.1, 0.3, 0.5], [0.5, 0.3, 0.1, 0.1], [0.5, 0.2, 0.2, 0.1], [0.5, 0.25, 0.15, 0.1]])
    encoded = looking(torch.stack([head, head]), [0.0, 2.0, 0.0, 0.0])
    assert kept(policy, encoded, 2) == expected


def test_codebook_takes_what_is_least_like_any_prototype() -> None:
    encoded = image(directions(0, 40, 90, 140, 200) * torch.tensor([[1.0], [9.0], [2.0], [1.0], [3.0]]))
    encoded.prototypes = directions(0, 130)
    assert kept(Codebook(), encoded, 1) == [4]  # 70 degrees from the nearest; the others 0, 40, 40 and 10
    assert kept(Codebook(), encoded, 3) == [1, 2, 4]
    assert kept(Codebook(), encoded, Knee()) == [4]


def carried(sources: Tensor, targets: Tensor, size: int) -> EncodedImage:
    """An image whose rows go through the vision layer like this, [N, width]."""
    return EncodedImage(torch.zeros(len(sources), 1), size, 2, {"vision_states": torch.stack([sources, targets])})


FLAT = TopV(spatial_weight=0, central_weight=0, recovered_ratio=0, rounds=1, transport_temperature=1 / math.log(4))


def test_topv_asks_what_the_targets_are_made_of() -> None:
    # A target has weight 1 on the source that it equals and 1/4 on the others, 2 in all: half of it and an eighth.
    # Targets 0, 0, 0, 1 and 1: source 0 gives 1.5 + 0.25, source 1 gives 1 + 0.375, the others 0.625 each.
    encoded = carried(torch.eye(5), torch.eye(5)[[0, 0, 0, 1, 1]], 5)
    assert kept(FLAT, encoded, 1) == [0]
    assert kept(FLAT, encoded, 2) == [0, 1]
    assert kept(FLAT, encoded, TopP(0.6)) == [0, 1]  # 3.125 of 5
    # Source 3 of a second tile is all that its targets are like, and gives 2.5.
    tiles = carried(torch.eye(5).repeat(2, 1), torch.eye(5)[[0, 0, 0, 1, 1, 3, 3, 3, 3, 3]], 5)
    assert kept(FLAT, tiles, 2) == [0, 8]


def test_topv_prefers_what_is_near_to_all_and_to_the_centre() -> None:
    encoded = carried(torch.ones(10, 1), torch.ones(10, 1), 10)  # a class token and 3 x 3 patches; 5 is the middle one
    assert kept(replace(FLAT, spatial_weight=1.0), encoded, 2) == [0, 5]
    assert kept(replace(FLAT, central_weight=1.0), encoded, 2) == [0, 5]


def test_topv_recovers_evenly_spaced_features_of_the_rest() -> None:
    encoded = carried(torch.ones(8, 1), torch.ones(8, 1), 2)  # equal scores
    assert kept(replace(FLAT, recovered_ratio=0.4), encoded, 5) == [0, 1, 2, 4, 6]  # of 3 to 7
    assert kept(replace(FLAT, recovered_ratio=1.0), encoded, 2) == [2, 6]


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_topv_is_the_literal_algorithm_of_sinkhorn(rounds: int) -> None:
    rng = torch.Generator().manual_seed(rounds)
    states = torch.randn(2, 2, 10, 4, generator=rng, dtype=torch.float64)
    places = torch.tensor([[0.0, 0.0], *([row / 3, column / 3] for row in (-1, 0, 1) for column in (-1, 0, 1))])
    scores: list[float] = []
    for sources, targets in states:
        cost = 1 - F.cosine_similarity(sources[:, None], targets[None], dim=2)
        cost += 0.7 * (places[:, None] - places).norm(dim=2) + 0.3 * places.norm(dim=1)[:, None]
        plan = (-cost / 0.2).exp()
        for _ in range(rounds - 1):
            plan /= plan.sum(dim=0)
            plan /= plan.sum(dim=1, keepdim=True)
        scores += (plan / plan.sum(dim=0)).sum(dim=1).tolist()
    policy = TopV(0.7, 0.3, 0.0, rounds, 0.2)
    entering, leaving = states.float().transpose(0, 1).flatten(1, 2)
    encoded = carried(entering, leaving, 10)
    assert kept(policy, encoded, 7) == sorted(sorted(range(20), key=lambda n: -scores[n])[:7])


@pytest.mark.parametrize(
    ("side", "blocks"),
    [
        (2, [[1, 2, 3, 4]]),
        (3, [[1, 2, 4, 5], [3, 6], [7, 8], [9]]),
        (4, [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]),
    ],
)
def test_pool_averages_two_by_two_patches_and_keeps_class_tokens(side: int, blocks: list[list[int]]) -> None:
    size = side * side + 1
    encoded = image(torch.zeros(2 * size, 1), tiles=2)
    assert kept(Pool(), encoded, 1) == [0, size]
    assert groups(Pool(), encoded, 1) == [*blocks, *([size + n for n in block] for block in blocks)]
