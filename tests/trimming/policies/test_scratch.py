"""What choosing takes for a while is what the engine sets aside for it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.peak_memory import assert_takes_at_most
from tests.trimming.policies.trained import drawn_modules
from trimserve import ops
from trimserve.api.trim import FixedRatio
from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import EncodedImage, Observation
from trimserve.trimming.merging import group_dropped
from trimserve.trimming.plan import scratch_bytes
from trimserve.trimming.policies.exit import Exit
from trimserve.trimming.policies.policy import AfterFirstLayer, BeforeDecoder, CrossAttentionView, Policy
from trimserve.trimming.policies.sparsevlm import SparseVLM
from trimserve.trimming.policies.table import POLICIES
from trimserve.trimming.trained import Shape

TILES, SIZE, WIDTH = 4, 785, 512
"""A tile of 28 x 28 patches."""


def features() -> Tensor:
    return torch.randn(TILES * SIZE, WIDTH, generator=torch.Generator().manual_seed(0))


def encoded() -> EncodedImage:
    rows = features()
    observed: dict[Observation, Tensor] = {
        "class_attention": rows[:, :3].T.softmax(dim=1),
        "vision_attention": rows[:, :256].view(len(rows), 2, 2, 64).permute(1, 0, 2, 3),
        "vision_states": rows.view(len(rows), 2, -1).transpose(0, 1),
        "patch_entropy": rows[:, 0].abs(),
    }
    trained = drawn_modules(Shape(WIDTH, SIZE, 2, 1 + 9 * 9))
    return EncodedImage(rows, SIZE, 2, observed, prototypes=rows[:64], trained=trained)


def layer() -> CrossAttentionView:
    rows = features()
    seen = torch.tensor([[0, len(rows)]] * 16, dtype=torch.int32)
    return CrossAttentionView(
        rows[:16].view(16, 8, 64), rows[:, :128].view(-1, 2, 64), rows, seen, 0.1, (len(rows),), SIZE
    )


CHOOSING = [policy() for policy in POLICIES.values() if policy is not Exit]


@pytest.mark.parametrize("policy", [*CHOOSING, SparseVLM(recycle_ratio=1.0)], ids=str)
def test_a_policy_takes_no_more_than_is_set_aside(policy: Policy) -> None:
    allowance = Allowance(FixedRatio(0.1))
    if isinstance(policy, BeforeDecoder):
        image = encoded()
        assert_set_aside(lambda: policy.choose_for(image, allowance, image.features[0]).kept)
    else:
        assert isinstance(policy, AfterFirstLayer)
        [seen] = layer().images()
        assert_set_aside(lambda: policy.choose(seen, allowance).kept)


@pytest.mark.parametrize("method", ["quecc", "flashsloth"])
def test_reading_the_question_takes_no_more_than_is_set_aside_where_many_rows_are_made(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, width, windows = 1 + 24 * 24, 4096, 12 * 12
    groups = torch.arange(TILES * (size - 1)) % (TILES * windows)
    monkeypatch.setattr("trimserve.trimming.compressor.alike", lambda *_: groups[None])  # which takes long
    module = drawn_modules(Shape(width, size, 2, 1 + windows))[method]
    tiles, text = torch.randn(1, TILES, size, width), torch.randn(1, width)
    with torch.inference_mode():
        assert_set_aside(lambda: module(tiles, text).group, scratch_bytes(TILES, size, width))


def test_merging_takes_no_more_than_is_set_aside() -> None:
    rows, kept = features(), torch.arange(0, TILES * SIZE, 10)
    assert_set_aside(lambda: group_dropped(rows[:, None], kept, (TILES * SIZE,), SIZE, 0.1).members)


def test_scores_do_without_the_weights_of_all_heads_and_rows() -> None:
    num_rows, num_features, num_heads = 64, 6400, 32
    queries, keys = torch.randn(num_rows, num_heads, 16), torch.randn(num_features, 8, 16)
    visibility = torch.tensor([[0, num_features]] * num_rows, dtype=torch.int32)
    weights_bytes = 4 * num_rows * num_features * num_heads
    assert_takes_at_most(lambda: ops.headwise_scores(queries, keys, visibility, 0.25), weights_bytes // 4)


def assert_set_aside(call: Callable[[], Tensor], is_set_aside: int = scratch_bytes(TILES, SIZE, WIDTH)) -> None:
    assert_takes_at_most(call, is_set_aside)
