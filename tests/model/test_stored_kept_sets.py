"""A prefill that is told what an earlier one kept asks nobody, and computes the same, bit for bit."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.conftest import Pair
from tests.model.random_checkpoint import Geometry, equip
from tests.model.test_mllama import TWO_APART, noise, raw
from trimserve.api.trim import FixedCount, FixedRatio, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.pages import OwnKeyValues, OwnPages
from trimserve.model.decoder_layers import CrossLayer
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.model.prefilled import Prefilled
from trimserve.model.prompt_rows import _view
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.plan import TrimPlan
from trimserve.trimming.policies.exit import Exit
from trimserve.trimming.policies.policy import CrossAttentionView
from trimserve.trimming.policies.table import POLICIES
from trimserve.trimming.selection import KeptSets

REQUESTS = {
    **{
        f"{name}, {how}": TrimRequest(
            policy=name, k_ratio=0.1, budget=FixedRatio(0.3) if policy.budgets else None, merge_ratio=merge_ratio
        )
        for name, policy in POLICIES.items()
        if policy is not Exit
        for how, merge_ratio in (("dropping", 0.0), ("merging", 0.2))
    },
    "head-wise": TrimRequest(k_ratio=0.1),
    "recycling": TrimRequest(policy="sparsevlm", budget=FixedCount(9), parameters={"recycle_ratio": 1.0}),
    **{
        f"{kind} {how}": TrimRequest(policy=name, budget=FixedCount(9), merge_ratio=merge_ratio, parameters=parameters)
        for kind, name, parameters in (
            ("cascade", "sparsevlm", {"cascade_ratio": 0.5}),
            ("exit", "todre", {"late_exit_threshold": 0.3}),
            ("early exit", "todre", {"late_exit_threshold": 1.0}),
        )
        for how, merge_ratio in (("dropping", 0.0), ("merging", 0.2))
    },
    "router": TrimRequest(policy="exit", parameters={"certainty": 0.0}),
    "untrimmed": TrimRequest(enabled=False),
}


@pytest.fixture(scope="module")
def deep(make_pair: Callable[..., Pair], tmp_path_factory: pytest.TempPathFactory) -> Mllama:
    """Three cross-attention layers with pages of their own, a codebook and a guide."""
    folder = make_pair(Geometry(num_layers=7, cross_layers=(0, 2, 5))).folder
    codebook = tmp_path_factory.mktemp("codebook") / "codebook.safetensors"
    return load_model(equip(ModelConfig(model=str(folder)), codebook), EngineConfig())


def read(
    model: Mllama, trim: TrimPlan, images: list[EncodedImage], stored: KeptSets | None = None
) -> tuple[Prefilled, OwnKeyValues, Tensor]:
    """A prompt about two images: the prefill, its keys and values, and a step."""
    tile = model.info.tile_size
    prompt = model.prepare(raw(TWO_APART, [noise((1, 2), tile, 1), noise((2, 2), tile, 2)]))
    if not images:
        images += [run_through(model.encode_image(image, trim.needs)) for image in prompt.images]
    kv = OwnPages(model.info, 2**22).key_values(len(prompt.token_ids) + 1, sum(each.num_features for each in images))
    prefilled = run_through(model.prefill(prompt, images, trim, kv, stored))
    return prefilled, kv, model.decode([7], [kv]).clone()


def rows_held(kv: OwnKeyValues) -> list[Tensor]:
    """Keys and values of every layer that decoding reads."""
    held = []
    for tables, lengths in ((kv.self_tables, [kv.length] * len(kv.self_tables)), (kv.cross_tables, kv.cross_lengths)):
        for table, length in zip(tables, lengths, strict=True):  # a page holds one layer
            pages = kv.pages[torch.from_numpy(table).long(), 0]
            held.append(pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length])
    return held


@pytest.mark.parametrize("name", REQUESTS)
def test_a_stored_kept_set_gives_the_same_bits_and_nobody_is_asked(
    deep: Mllama, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trim = TrimPlan.of(REQUESTS[name])
    images: list[EncodedImage] = []
    first, kv, step = read(deep, trim, images)
    stored: KeptSets = pickle.loads(pickle.dumps(first.kept_sets))
    assert (bool(stored.sets) or stored.left_after is not None) == (trim.policy is not None)
    for policy in POLICIES.values():
        for question in ("choose", "choose_for"):
            monkeypatch.setattr(policy, question, lambda *_: pytest.fail("the policy was asked"), raising=False)
        monkeypatch.setattr(policy, "after_layer", lambda *_: pytest.fail("the policy was asked"))
    monkeypatch.setattr(Mllama, "look", lambda *_: pytest.fail("the guide was asked"))
    fresh = [EncodedImage(image.features, image.features_per_tile) for image in images]
    again, kv_again, step_again = read(deep, pickle.loads(pickle.dumps(trim)), fresh, stored)
    assert torch.equal(again.logits, first.logits)
    assert torch.equal(step_again, step)
    assert kv_again.cross_lengths == kv.cross_lengths
    assert [None if bias is None else bias.tolist() for bias in kv_again.cross_biases] == [
        None if bias is None else bias.tolist() for bias in kv.cross_biases
    ]
    for ours, theirs in zip(rows_held(kv_again), rows_held(kv), strict=True):
        assert torch.equal(ours, theirs)
    for count in ("num_kept", "num_merged", "num_held", "layer_rows"):
        assert getattr(again, count) == getattr(first, count)
    assert pickle.dumps(again.kept_sets) == pickle.dumps(first.kept_sets)


def test_a_kept_set_says_what_each_layer_kept_and_where_the_request_left(deep: Mllama) -> None:
    cascade, _, _ = read(deep, TrimPlan.of(REQUESTS["cascade merging"]), [])
    assert [(each.layer, each.num_kept) for each in cascade.kept_sets.sets] == [(0, (9, 9)), (1, (5, 5)), (2, (3, 3))]
    assert cascade.kept_sets.sets[0].num_groups == cascade.num_merged
    assert cascade.kept_sets.sets[1].members is None
    leaving, kv, _ = read(deep, TrimPlan.of(REQUESTS["early exit dropping"]), [])
    assert (leaving.kept_sets.left_after, kv.cross_lengths) == (0, [9, 0, 0])
    assert [each.layer for each in leaving.kept_sets.sets] == [-1]


@pytest.mark.parametrize("name", ["untrimmed", "head-wise", "cls, merging", "guided, dropping", "cascade merging"])
def test_only_a_policy_that_is_asked_after_a_layer_is_shown_it(
    deep: Mllama, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shown = []

    def watched(attended: Any, layer: CrossLayer, *rows: Any) -> CrossAttentionView:
        shown.append(layer.index)
        return _view(attended, layer, *rows)

    monkeypatch.setattr("trimserve.model.prompt_rows._view", watched)
    read(deep, TrimPlan.of(REQUESTS[name]), [])
    assert shown == {"head-wise": [0], "cascade merging": [0, 1, 2]}.get(name, [])
