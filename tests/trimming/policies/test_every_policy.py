"""What holds for each policy: exact counts, images apart, and nothing that a feature may be breaks it."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.trimming.policies.trained import drawn_modules
from trimserve.api.trim import FixedCount, FixedRatio, TrimRequest
from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import EncodedImage, Observation
from trimserve.trimming.plan import TrimPlan, select
from trimserve.trimming.policies.exit import Exit
from trimserve.trimming.policies.policy import AfterFirstLayer, BeforeDecoder, Choice, CrossAttentionView, Policy
from trimserve.trimming.policies.sparsevlm import SparseVLM
from trimserve.trimming.policies.table import POLICIES
from trimserve.trimming.trained import Shape

SIZE = 10
"""Features of a tile: a class token and 3 x 3 patches."""

ASKED: dict[str, Policy] = {
    **{name: policy() for name, policy in POLICIES.items() if policy is not Exit},  # which chooses no features
    "sparsevlm, recycling": SparseVLM(recycle_ratio=1.0),
}
NAMES = list(ASKED)
WITH_BUDGET = [name for name, policy in ASKED.items() if policy.budgets]


def features(num_tiles: int, seed: int = 0) -> Tensor:
    """[tiles * SIZE, 16]."""
    return torch.randn(num_tiles * SIZE, 16, generator=torch.Generator().manual_seed(seed))


def layer_of(*images: Tensor) -> CrossAttentionView:
    """Three rows for each image, which see that image only."""
    counts = [len(image) for image in images]
    together = torch.cat(images)
    keys = together.view(-1, 2, 8)
    queries = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1)).repeat(len(images), 1, 1)
    ends = torch.tensor(counts).cumsum(0)
    seen = torch.stack([ends - torch.tensor(counts), ends], dim=1).repeat_interleave(3, dim=0).int()
    return CrossAttentionView(queries, keys, together, seen, 0.5, counts, SIZE)


def encoded(image: Tensor) -> EncodedImage:
    """An image whose class tokens attend to what its features say."""
    observed: dict[Observation, Tensor] = {
        "class_attention": image[:, :3].T.softmax(dim=1),
        "vision_attention": image.view(len(image), 2, 2, 4).transpose(0, 1),
        "vision_states": image.view(len(image), 2, 8).transpose(0, 1),
        "patch_entropy": image[:, 0].abs(),
    }
    prototypes = F.normalize(torch.eye(3, 16) + 0.1, dim=1)
    return EncodedImage(image, SIZE, 2, observed, prototypes, trained=drawn_modules(Shape(16, SIZE, 2, 5)))


def choices(name: str, allowance: Allowance, *images: Tensor) -> list[Choice]:
    """What a policy keeps of each image of one request."""
    policy = ASKED[name]
    if isinstance(policy, BeforeDecoder):
        text = torch.linspace(-1, 1, 16)
        return [policy.choose_for(encoded(image), allowance, text) for image in images]
    assert isinstance(policy, AfterFirstLayer)
    return [policy.choose(image, allowance) for image in layer_of(*images).images()]


def kept(name: str, count: int, image: Tensor) -> list[int]:
    """What a policy keeps of an image alone."""
    [choice] = choices(name, Allowance(FixedCount(count)), image)
    return choice.kept.tolist()


def num_rows(choice: Choice) -> int:
    """Rows that the image holds."""
    return len(choice.kept) + (len(choice.groups.sizes) if choice.groups else 0)


def members(choice: Choice) -> list[int]:
    """What is averaged."""
    return choice.groups.members.tolist() if choice.groups else []


@pytest.mark.parametrize("name", WITH_BUDGET)
@pytest.mark.parametrize("num_tiles", [1, 4])
@pytest.mark.parametrize("ratio", [0.01, 0.33, 0.9, 1.0])
def test_as_many_features_stay_as_the_budget_says(name: str, num_tiles: int, ratio: float) -> None:
    [choice] = choices(name, Allowance(FixedRatio(ratio)), features(num_tiles))
    assert num_rows(choice) == math.ceil(ratio * num_tiles * SIZE)
    kept = choice.kept.tolist()
    assert kept == sorted(set(kept) & set(range(num_tiles * SIZE)))
    if choice.groups is not None:
        averaged = members(choice)
        assert len(set(averaged)) == len(averaged) == choice.groups.sizes.sum()
        assert set(averaged) <= set(range(num_tiles * SIZE)) - set(kept)
        assert len(choice.groups.sizes) == sum(choice.groups.num_groups)


@pytest.mark.parametrize("name", WITH_BUDGET)
def test_a_budget_above_the_image_keeps_all_of_it(name: str) -> None:
    assert kept(name, 99, features(2)) == list(range(2 * SIZE))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])  # whose seed is the image's index
def test_images_are_chosen_from_apart(name: str) -> None:
    images = [features(2, 1), features(1, 2), features(4, 3)]
    allowance = Allowance(FixedRatio(0.3))
    together = choices(name, allowance, *images)
    for image, choice in zip(images, together, strict=True):
        [alone] = choices(name, allowance, image)
        assert choice.kept.tolist() == alone.kept.tolist()
        assert members(choice) == members(alone)


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_is_the_same_every_time(name: str) -> None:
    assert kept(name, 11, features(3)) == kept(name, 11, features(3))


@pytest.mark.parametrize("name", WITH_BUDGET)
def test_equal_features_are_as_good_as_any(name: str) -> None:
    [choice] = choices(name, Allowance(FixedCount(7)), torch.ones(2 * SIZE, 16))
    assert num_rows(choice) == 7


@pytest.mark.parametrize("name", WITH_BUDGET)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_break_nothing(name: str, value: float) -> None:
    image = features(2)
    image[3] = value
    image[5, 2] = -value
    for broken in (image, torch.full_like(image, value)):
        [choice] = choices(name, Allowance(FixedCount(12)), broken)
        assert num_rows(choice) == 12


@pytest.mark.parametrize("name", ["mmr", "cdpruner", "gprune", "divprune", "todre", "topv", "codebook"])
def test_features_that_are_no_numbers_come_last_in_their_tile(name: str) -> None:
    image = features(1)
    image[3] = math.nan
    policy, allowance = POLICIES[name](), Allowance(FixedCount(SIZE - 1))
    if isinstance(policy, BeforeDecoder):
        choice = policy.choose(encoded(image), allowance)
    else:
        assert isinstance(policy, AfterFirstLayer)
        layer = layer_of(image)
        layer.scores = torch.rand(4, SIZE, generator=torch.Generator().manual_seed(2))
        choice = policy.choose(layer.images()[0], allowance)
    assert choice.kept.tolist() == [n for n in range(SIZE) if n != 3]


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if issubclass(policy, AfterFirstLayer)])
def test_without_a_budget_as_many_stay_as_trimmed_keeps(name: str) -> None:
    layer = layer_of(features(2, 1), features(1, 2))
    trim = TrimPlan.of(TrimRequest(policy=name, k_ratio=0.15, max_kept_fraction=0.4))
    assert (
        select(layer, trim).num_kept
        == select(layer, TrimPlan.of(TrimRequest(k_ratio=0.15, max_kept_fraction=0.4))).num_kept
    )
