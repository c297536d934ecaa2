"""Cross-attention layers that hold less than the one before: the cascade of `sparsevlm`, the late exit of `todre`."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.model.conftest import NO_TRIM, Pair
from tests.model.peer import UNSEEN, Peer
from tests.model.random_checkpoint import Geometry
from tests.model.test_mllama import ONE, THREE_MIXED, TWO_APART, noise, raw
from tests.tolerances import LOGITS
from trimserve.api.trim import FixedCount, FixedRatio, TrimRequest
from trimserve.evaluation.pages import OwnKeyValues
from trimserve.model.decoder import SequenceRows
from trimserve.model.interruptible import run_through
from trimserve.trimming.plan import TrimPlan
from trimserve.trimming.policies.policy import CrossAttentionView, Verdict

CONTINUATION = [7, 3]
EXIT = {"late_exit_threshold": 1.0}
"""What attention adds is always a smaller share."""


def cascade(ratio: float, count: int, merge_ratio: float = 0.0) -> TrimPlan:
    """`sparsevlm` that keeps so many, and of these a share in each later layer."""
    parameters = {"cascade_ratio": ratio}
    return TrimPlan.of(
        TrimRequest(policy="sparsevlm", budget=FixedCount(count), merge_ratio=merge_ratio, parameters=parameters)
    )


SHARED = Geometry(num_layers=6, cross_layers=(0, 2, 5))
"""Three self- and three cross-attention layers: a page holds all three of a kind."""
ALONE = Geometry(num_layers=7, cross_layers=(0, 2, 5))
"""Four and three: a page holds one layer."""


@pytest.fixture(scope="module")
def deep(make_pair: Callable[..., Pair]) -> Pair:
    """Three cross-attention layers with pages of their own."""
    return make_pair(ALONE)


def read(pair: Pair, text: str, images: list[Image.Image], trim: TrimPlan) -> SequenceRows:
    """The prompt's rows, not prefilled yet."""
    prepared = pair.ours.prepare(raw(text, images))
    kv = pair.granted(prepared, 4)
    return pair.ours.prompt_rows(prepared, pair.encoded(prepared, trim), trim, kv)


def held(rows: SequenceRows) -> OwnKeyValues:
    """Keys and values of a prompt."""
    assert isinstance(rows.kv, OwnKeyValues)
    return rows.kv


def answered(pair: Pair, rows: SequenceRows, token_ids: list[int]) -> Tensor:
    """Logits of prompt rows and decoded rows."""
    logits = pair.ours.logits([rows], token_ids[: rows.num_rows])
    return torch.cat([logits, *(pair.ours.decode([token], [held(rows)]) for token in token_ids[rows.num_rows :])])


@pytest.mark.parametrize(("geometry", "layers_per_page"), [(ALONE, 1), (SHARED, 3)])
def test_after_a_late_exit_cross_attention_layers_are_shut_and_hold_nothing(
    make_pair: Callable[..., Pair], geometry: Geometry, layers_per_page: int
) -> None:
    pair = make_pair(geometry)
    images = [noise((1, 2), pair.ours.info.tile_size)]
    trim = TrimPlan.of(TrimRequest(policy="todre", budget=FixedRatio(1.0), parameters=EXIT))
    rows = read(pair, "before " + ONE, images, trim)
    token_ids = [*pair.ours.prepare(raw("before " + ONE, images)).token_ids, *CONTINUATION]
    untrimmed = pair.peer.logits(token_ids, images)
    for index in (2, 5):
        layer = pair.peer.model.model.language_model.layers[index]
        layer.cross_attn_attn_gate.data.zero_()
        layer.cross_attn_mlp_gate.data.zero_()
    expected = pair.peer.logits(token_ids, images)
    assert (expected - untrimmed).abs().max() > 100 * LOGITS
    torch.testing.assert_close(answered(pair, rows, token_ids), expected, atol=LOGITS, rtol=0)
    num_features = 2 * pair.ours.info.features_per_tile
    assert held(rows).cross_lengths == [num_features, 0, 0]
    num_pages = 2  # for 20 rows
    held(rows).give_back_unused()
    assert held(rows).owned.cross_bytes == num_pages * 16 * layers_per_page * pair.ours.info.kv_bytes_per_position


def test_a_threshold_that_is_never_reached_changes_nothing(deep: Pair) -> None:
    prompt = raw(ONE, [noise((1, 2), deep.ours.info.tile_size)])
    trim = TrimPlan.of(TrimRequest(policy="todre", budget=FixedRatio(1.0), parameters={"late_exit_threshold": 1e-9}))
    logits, kv = deep.logits(prompt, trim)
    assert torch.equal(logits, deep.logits(prompt)[0])
    assert kv.cross_lengths == [2 * deep.ours.info.features_per_tile] * 3


@pytest.mark.parametrize("geometry", [ALONE, SHARED])
def test_a_cascade_equals_the_peer_on_what_a_literal_reading_keeps(
    make_pair: Callable[..., Pair], geometry: Geometry
) -> None:
    pair = make_pair(geometry)
    images = [noise((2, 2), pair.ours.info.tile_size)]
    rows = read(pair, "before " + ONE, images, cascade(0.55, 21))
    token_ids = [*pair.ours.prepare(raw("before " + ONE, images)).token_ids, *CONTINUATION]
    expected = literal_cascade(pair.peer, token_ids, images, rows.num_rows, [21, 12, 7])
    torch.testing.assert_close(answered(pair, rows, token_ids), expected, atol=LOGITS, rtol=0)
    assert held(rows).cross_lengths == [21, 12, 7]
    flat = answered(pair, read(pair, "before " + ONE, images, cascade(1.0, 21)), token_ids)
    assert (flat - expected).abs().max() > 100 * LOGITS


@torch.inference_mode()
def literal_cascade(
    peer: Peer, token_ids: list[int], images: list[Image.Image], num_prompt: int, counts: list[int]
) -> Tensor:
    """Logits of every row when each cross-attention layer hands so many features of one image on."""
    inputs = peer.inputs(token_ids, images)
    features, left = peer.features(inputs), iter(counts)
    sees = inputs["cross_attention_mask"][0].flatten(1).any(dim=1)
    is_decoded = torch.arange(len(token_ids)) >= num_prompt

    def attend(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Prompt rows see what the layer was handed, decoded ones what it hands on."""
        nonlocal features
        attention, size, given = layer.cross_attn, layer.cross_attn.head_dim, features
        q = attention.q_norm(attention.q_proj(layer.input_layernorm(hidden)[0]).view(len(token_ids), -1, size))
        k = attention.k_norm(attention.k_proj(given[0]).view(given.shape[1], -1, size))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits = torch.einsum("thd,nhd->htn", q[sees & ~is_decoded], k) / size**0.5
        relevance = logits.softmax(dim=1).mean(dim=(0, 2))
        scores = logits.softmax(dim=2)[:, relevance >= relevance.mean()].mean(dim=(0, 1))
        kept = scores.topk(next(left)).indices.sort().values
        features = given[:, kept]
        is_kept = torch.zeros(given.shape[1], dtype=torch.bool).index_fill(0, kept, True)
        is_hidden = ~sees[:, None] | (is_decoded[:, None] & ~is_kept)
        return given, torch.zeros(is_hidden.shape).masked_fill(is_hidden, UNSEEN)

    return peer.read(inputs, attend)


def test_images_are_counted_apart_and_merged_rows_stay_in_every_layer(deep: Pair) -> None:
    tile, size = deep.ours.info.tile_size, deep.ours.info.features_per_tile
    prepared = deep.ours.prepare(raw("<|image|><|image|>both", [noise((2, 2), tile, 1), noise((1, 1), tile, 2)]))
    trim = cascade(0.5, 9, merge_ratio=0.1)  # one row of the ten features of each tile
    kv = deep.granted(prepared)
    prefilled = run_through(deep.ours.prefill(prepared, deep.encoded(prepared), trim, kv))
    assert (prefilled.num_valid, prefilled.num_kept, prefilled.num_merged) == ((4 * size, size), (9, 9), (4, 1))
    assert prefilled.layer_rows == ((13, 10), (9, 6), (7, 4))
    assert kv.cross_lengths == [23, 15, 11]
    assert prefilled.num_held == (13, 10)
    biases = [sorted(bias[bias > 0]) for bias in kv.cross_biases if bias is not None]
    assert len(biases) == 3
    assert biases[0] == biases[1] == biases[2]
    assert len(biases[0]) == 4  # the one dropped feature of the second image weighs as much as itself
    assert len(prefilled.later_trim_times) == 2


def test_only_what_decoding_sees_is_held(deep: Pair) -> None:
    tile = deep.ours.info.tile_size
    rows = read(deep, TWO_APART, [noise((2, 2), tile, 1), noise((1, 1), tile, 2)], cascade(0.5, 8))
    deep.ours.logits([rows], deep.ours.prepare(raw(TWO_APART, [noise((1, 1), tile)] * 2)).token_ids)
    assert rows.vision is not None
    assert rows.vision.layer_rows == [(8, 8), (4, 4), (2, 2)]
    assert held(rows).cross_lengths == [8, 4, 2]


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_batch_of_all_kinds_equals_each_alone(deep: Pair, monkeypatch: pytest.MonkeyPatch, is_compiled: bool) -> None:
    if not is_compiled:
        monkeypatch.setattr(deep.ours._decoder, "_compiled", None)
    tile = deep.ours.info.tile_size
    leaving = TrimPlan.of(TrimRequest(policy="todre", budget=FixedCount(6), parameters=EXIT))
    requests = [
        (ONE, [noise((1, 2), tile, 1)], leaving),
        ("no image at all", [], NO_TRIM),
        ("rows before " + ONE, [noise((2, 2), tile, 2)], cascade(0.4, 30, merge_ratio=0.2)),
        (TWO_APART, [noise((1, 1), tile, 3), noise((1, 2), tile, 4)], leaving),
        (THREE_MIXED, [noise((1, 1), tile, seed) for seed in (5, 6, 7)], NO_TRIM),
    ]
    prepared = [deep.ours.prepare(raw(text, images)) for text, images, _ in requests]
    prompts = [prompt.token_ids for prompt in prepared]
    pool = deep.pool

    def fresh() -> list[SequenceRows]:
        rows = [read(deep, text, images, trim) for text, images, trim in requests]
        for each, prompt in zip(rows, prepared, strict=True):
            each.kv = deep.granted(prompt, 4, pool)
        return rows

    together, apart = fresh(), fresh()
    logits = deep.ours.logits(together, [token for prompt in prompts for token in prompt])
    alone = [deep.ours.logits([rows], prompt) for rows, prompt in zip(apart, prompts, strict=True)]
    torch.testing.assert_close(logits, torch.cat(alone), atol=LOGITS, rtol=0)
    assert [held(rows).cross_lengths for rows in together] == [held(rows).cross_lengths for rows in apart]
    for tokens in ([3, 14, 15, 9, 2], [6, 5, 3, 5, 8]):
        decoded = deep.ours.decode(tokens, [held(rows) for rows in together])
        one_by_one = [deep.ours.decode([token], [held(rows)]) for token, rows in zip(tokens, apart, strict=True)]
        torch.testing.assert_close(decoded, torch.cat(one_by_one), atol=LOGITS, rtol=0)


def test_the_share_of_the_image_is_a_mean_over_rows() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]])
    added = torch.tensor([[0.0, 5.0], [0.0, 0.0], [0.0, -6.0]])
    # 5 / 10, 0 / 1 and 6 / 8: five twelfths.
    nothing = torch.zeros(3, 1, 1)
    view = CrossAttentionView(nothing, nothing, rows, torch.zeros(3, 2, dtype=torch.int32), 1.0, [3], 3)
    for threshold, verdict in ((5 / 12 - 1e-4, Verdict.KEEP_ALL), (5 / 12 + 1e-4, Verdict.LEAVE)):
        trim = TrimPlan.of(TrimRequest(policy="todre", parameters={"late_exit_threshold": threshold}))
        assert trim.is_asked_after(0)
        assert trim.is_asked_after(2)
        view.hidden, view.added = rows, added
        assert trim.after_layer(view) is verdict
        view.added = added * math.nan
        assert trim.after_layer(view) is Verdict.KEEP_ALL
    assert not TrimPlan.of(TrimRequest(policy="todre")).is_asked_after(0)
    assert not TrimPlan.of(TrimRequest(policy="todre", enabled=False, parameters=EXIT)).is_asked_after(0)
