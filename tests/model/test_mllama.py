"""Our Mllama against transformers' with Meta's semantics, row by row and token by token."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from tests.model.conftest import NO_TRIM, Pair
from tests.model.peer import Peer
from tests.model.random_checkpoint import Geometry, draw_geometry
from tests.tolerances import LOGITS, LOGITS_BFLOAT16
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Prompt, RawPrompt, Text
from trimserve.api.trim import FixedCount, FixedRatio, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.model.decoder import SequenceRows
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.plan import TrimPlan, choose_from_image
from trimserve.trimming.policies.table import POLICIES

ONE = "<|image|>What is this?"
TWO_APART = "First<|image|>one, then<|image|>another: compare"
THREE_MIXED = "<|image|><|image|>a pair, and later<|image|>the third"


def noise(tiles: tuple[int, int], tile_size: int, seed: int = 0) -> PilImage.Image:
    """An image that the processor cuts into tiles (high, wide)."""
    shape = (tiles[0] * tile_size, tiles[1] * tile_size, 3)
    return PilImage.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(image: PilImage.Image) -> ImageFile:
    """The image as a client sends it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return ImageFile(buffer.getvalue())


def raw(text: str, images: list[PilImage.Image]) -> RawPrompt:
    """A raw prompt."""
    return RawPrompt(text, tuple(encoded(image) for image in images))


def assert_logits_equal(pair: Pair, prompt: Prompt, images: list[PilImage.Image]) -> None:
    """Every row's logits equal the peer's, on logits that vary and depend on the images."""
    token_ids = list(pair.ours.prepare(prompt).token_ids)
    expected = pair.peer.logits(token_ids, images)
    assert expected.std() >= 1
    if images:
        swapped = [noise((1, 1), pair.ours.info.tile_size, seed=99), *images[1:]]
        last_images = [*images[:-1], noise((1, 1), pair.ours.info.tile_size, seed=98)]
        for others in (swapped, last_images):
            assert (pair.peer.logits(token_ids, others) - expected).abs().max() > 100 * LOGITS
    logits, _ = pair.logits(prompt)
    torch.testing.assert_close(logits, expected, atol=LOGITS, rtol=0)


def assert_trimmed_logits_equal(
    pair: Pair, text: str, images: list[PilImage.Image], k_ratio: float, merge_ratio: float = 0.0
) -> None:
    """Prompt rows and decoded rows equal the peer's when its later layers see what the rules keep and merge."""
    prepared = pair.ours.prepare(raw(text, images))
    encoded_images = pair.encoded(prepared)
    kv = pair.granted(prepared, 2)
    rows = pair.ours.prompt_rows(
        prepared, encoded_images, TrimPlan.of(TrimRequest(k_ratio=k_ratio, merge_ratio=merge_ratio)), kv
    )
    logits = pair.ours.logits([rows], prepared.token_ids)
    continuation = [7, 3]
    decoded = torch.cat([pair.ours.decode([token], [kv]) for token in continuation])

    num_prompt = len(prepared.token_ids)
    token_ids = [*prepared.token_ids, *continuation]
    expected, kept = pair.peer.trimmed_logits(token_ids, images, k_ratio, merge_ratio, num_prompt)
    assert rows.vision is not None
    assert rows.vision.selection is not None
    assert rows.vision.selection.kept.tolist() == kept
    assert len(kept) < sum(image.num_features for image in encoded_images)
    torch.testing.assert_close(torch.cat([logits, decoded]), expected, atol=LOGITS, rtol=0)
    assert bool(rows.vision.num_merged) == bool(merge_ratio)
    untrimmed = pair.peer.logits(token_ids, images)
    assert (untrimmed - expected).abs().max() > 100 * LOGITS


@pytest.mark.parametrize(
    ("text", "grids"),
    [
        (ONE, [(1, 1)]),
        (ONE, [(1, 2)]),
        (ONE, [(2, 2)]),
        ("rows before the image " + ONE, [(3, 1)]),
        (TWO_APART, [(1, 1), (2, 2)]),
        (THREE_MIXED, [(2, 1), (1, 1), (2, 2)]),
        ("no image at all", []),
    ],
)
def test_logits_of_every_row_equal_the_peer(pair: Pair, text: str, grids: list[tuple[int, int]]) -> None:
    images = [noise(grid, pair.ours.info.tile_size, seed) for seed, grid in enumerate(grids)]
    assert_logits_equal(pair, raw(text, images), images)


def test_logits_of_a_chat_equal_the_peer(pair: Pair) -> None:
    images = [noise((1, 2), pair.ours.info.tile_size, 1), noise((1, 1), pair.ours.info.tile_size, 2)]
    first, second = (encoded(image) for image in images)
    turns = (
        Message("user", (first, Text("What is this?"))),
        Message("assistant", (Text("A noise."),)),
        Message("user", (Text("And this:"), second)),
    )
    assert_logits_equal(pair, ChatPrompt(turns), images)


@pytest.mark.parametrize("seed", range(8))
def test_logits_equal_the_peer_in_drawn_geometries(make_pair: Callable[..., Pair], seed: int) -> None:
    geometry = draw_geometry(seed)
    pair = make_pair(geometry, seed)
    wide = min(geometry.max_tiles, 3)
    images = [noise((1, wide), geometry.tile_size, 1), noise((1, 1), geometry.tile_size, 2)]
    assert_logits_equal(pair, raw(TWO_APART, images), images)
    images.append(noise((min(geometry.max_tiles, 2), 1), geometry.tile_size, 3))
    assert_trimmed_logits_equal(pair, THREE_MIXED, images, 0.2)
    assert_trimmed_logits_equal(pair, THREE_MIXED, images, 0.05, merge_ratio=0.15)


def test_text_only_logits_equal_unpatched_transformers(pair: Pair) -> None:
    prompt = raw("just words", [])
    expected = Peer(pair.folder, mended=False).logits(list(pair.ours.prepare(prompt).token_ids), [])
    torch.testing.assert_close(pair.logits(prompt)[0], expected, atol=LOGITS, rtol=0)


def test_intermediate_features_are_layer_inputs_unless_outputs_are_asked_for(pair: Pair) -> None:
    images = [noise((1, 2), pair.ours.info.tile_size)]
    prompt = raw(ONE, images)
    token_ids = list(pair.ours.prepare(prompt).token_ids)
    with_outputs = Peer(pair.folder, intermediate_inputs=False).logits(token_ids, images)
    assert (pair.logits(prompt)[0] - with_outputs).abs().max() > 100 * LOGITS
    config = ModelConfig(model=str(pair.folder), intermediate_features="outputs")
    switched = Pair(pair.folder, load_model(config, EngineConfig()), pair.peer)
    torch.testing.assert_close(switched.logits(prompt)[0], with_outputs, atol=LOGITS, rtol=0)


def test_rows_before_the_image_do_not_leak_it(pair: Pair) -> None:
    text = "a long beginning " + ONE
    tile_size = pair.ours.info.tile_size
    prompts = [raw(text, [noise((1, 1), tile_size, seed)]) for seed in (1, 2)]
    token_ids = list(pair.ours.prepare(prompts[0]).token_ids)
    num_before = token_ids.index(pair.ours.info.image_token_id)
    first, second = (pair.logits(prompt)[0] for prompt in prompts)
    assert torch.equal(first[:num_before], second[:num_before])
    leaky = Peer(pair.folder, mask_attention_output=False)
    leaks = [leaky.logits(token_ids, [noise((1, 1), tile_size, seed)])[:num_before] for seed in (1, 2)]
    assert (leaks[0] - leaks[1]).abs().max() > 100 * LOGITS


@pytest.mark.parametrize("cross_layers", [(1, 3), (0, 2)])
def test_decoded_rows_see_what_the_last_prompt_row_sees(
    make_pair: Callable[..., Pair], cross_layers: tuple[int, ...]
) -> None:
    pair = make_pair(Geometry(cross_layers=cross_layers))
    images = [noise((1, 1), pair.ours.info.tile_size, 1), noise((2, 1), pair.ours.info.tile_size, 2)]
    prompt = raw(TWO_APART, images)
    token_ids = list(pair.ours.prepare(prompt).token_ids)
    _, kv = pair.logits(prompt)
    assert kv.cross_lengths[0] == 2 * pair.ours.info.features_per_tile  # the first image is out of sight
    continuation = [5, 17, 9]
    expected = pair.peer.logits(token_ids + continuation, images)[len(token_ids) :]
    blind = pair.peer.inputs(token_ids + continuation, images)
    blind["cross_attention_mask"][:, len(token_ids) :] = 0
    with torch.inference_mode():
        assert (pair.peer.model(**blind).logits[0, len(token_ids) :] - expected).abs().max() > 100 * LOGITS
    decoded = torch.cat([pair.ours.decode([token], [kv]) for token in continuation])
    torch.testing.assert_close(decoded, expected, atol=LOGITS, rtol=0)


@pytest.mark.parametrize(("text", "grids"), [(ONE, [(2, 2)]), (THREE_MIXED, [(2, 1), (1, 1), (2, 2)])])
@pytest.mark.parametrize(("k_ratio", "merge_ratio"), [(0.05, 0.0), (0.3, 0.0), (0.05, 0.1), (0.1, 0.4)])
def test_trimmed_logits_equal_the_peer_on_what_the_rules_keep_and_merge(
    pair: Pair, text: str, grids: list[tuple[int, int]], k_ratio: float, merge_ratio: float
) -> None:
    images = [noise(grid, pair.ours.info.tile_size, seed) for seed, grid in enumerate(grids)]
    assert_trimmed_logits_equal(pair, text, images, k_ratio, merge_ratio)


def test_dropped_features_that_are_each_merged_alone_are_as_good_as_kept(pair: Pair) -> None:
    prompt = raw(TWO_APART, [noise(grid, pair.ours.info.tile_size, seed) for seed, grid in enumerate([(2, 2), (1, 2)])])
    logits, kv = pair.logits(prompt, TrimPlan.of(TrimRequest(k_ratio=0.05, merge_ratio=1.0)))
    untrimmed, whole = pair.logits(prompt)
    assert kv.cross_lengths[0] == whole.cross_lengths[0]
    torch.testing.assert_close(logits, untrimmed, atol=LOGITS, rtol=0)
    decoded = [pair.ours.decode([7], [held]) for held in (kv, whole)]
    torch.testing.assert_close(*decoded, atol=LOGITS, rtol=0)


def test_where_nothing_is_dropped_nothing_is_merged(pair: Pair) -> None:
    prompt = raw(ONE, [noise((2, 2), pair.ours.info.tile_size)])
    logits, kv = pair.logits(
        prompt, TrimPlan.of(TrimRequest(k_ratio=0.99, merge_ratio=0.5))
    )  # 0.99 of 40 features, rounded up
    untrimmed, whole = pair.logits(prompt)
    assert kv.cross_lengths[0] == whole.cross_lengths[0]
    torch.testing.assert_close(logits, untrimmed, atol=LOGITS, rtol=0)


def test_k_ratio_one_is_bit_for_bit_the_untrimmed_path(pair: Pair) -> None:
    prompt = raw(ONE, [noise((2, 2), pair.ours.info.tile_size)])
    for merge_ratio in (0.0, 0.5):
        trim = TrimPlan.of(TrimRequest(k_ratio=1.0, merge_ratio=merge_ratio))
        assert torch.equal(pair.logits(prompt, trim)[0], pair.logits(prompt, NO_TRIM)[0])


@pytest.mark.parametrize("policy", [name for name, each in POLICIES.items() if each.budgets])
def test_a_budget_of_everything_is_bit_for_bit_the_untrimmed_path(equipped: Pair, policy: str) -> None:
    prompt = raw(ONE, [noise((1, 2), equipped.ours.info.tile_size)])
    trim = TrimPlan.of(TrimRequest(policy=policy, k_ratio=0.1, budget=FixedRatio(1.0), merge_ratio=0.5))
    assert torch.equal(equipped.logits(prompt, trim)[0], equipped.logits(prompt)[0])
    almost = TrimPlan.of(
        TrimRequest(policy=policy, k_ratio=0.1, budget=FixedCount(2 * equipped.ours.info.features_per_tile))
    )
    assert torch.equal(equipped.logits(prompt, almost)[0], equipped.logits(prompt)[0])


@pytest.mark.parametrize("merge_ratio", [0.0, 0.3])
def test_what_is_chosen_before_the_decoder_is_all_that_it_gets(pair: Pair, merge_ratio: float) -> None:
    images = [noise((2, 2), pair.ours.info.tile_size, 1), noise((1, 2), pair.ours.info.tile_size, 2)]
    prompt = raw(TWO_APART, images)
    trim = TrimPlan.of(TrimRequest(policy="cls", budget=FixedRatio(0.3), merge_ratio=merge_ratio))
    prepared = pair.ours.prepare(prompt)
    encoded = pair.encoded(prepared, trim)
    rows = pair.ours.prompt_rows(prepared, encoded, trim, pair.granted(prepared))
    logits = pair.ours.logits([rows], prepared.token_ids)
    choices = [choose_from_image(image, trim) for image in encoded]
    assert rows.vision is not None
    assert rows.vision.num_held == tuple(
        len(choice.kept) + (len(choice.groups.sizes) if choice.groups else 0) for choice in choices
    )
    assert bool(rows.vision.num_merged) == bool(merge_ratio)

    # A row that stands for s features weighs as much as s equal ones.
    repeated = []
    for image, choice in zip(encoded, choices, strict=True):
        pieces = [image.features[choice.kept]]
        if choice.groups is not None:
            pieces.append(choice.groups.mean(image.features).repeat_interleave(choice.groups.sizes, dim=0))
        repeated.append(EncodedImage(torch.cat(pieces), image.features_per_tile))
    whole = pair.ours.prompt_rows(prepared, repeated, NO_TRIM, pair.granted(prepared))
    torch.testing.assert_close(logits, pair.ours.logits([whole], prepared.token_ids), atol=LOGITS, rtol=0)
    assert (logits - pair.logits(prompt)[0]).abs().max() > 100 * LOGITS


def test_a_mixed_ragged_batch_equals_each_alone(pair: Pair) -> None:
    tile = pair.ours.info.tile_size
    requests = [
        (raw("no image at all", []), NO_TRIM),
        (raw(ONE, [noise((2, 2), tile, 1)]), TrimPlan.of(TrimRequest(k_ratio=0.1))),
        (raw(THREE_MIXED, [noise((1, 1), tile, seed) for seed in (2, 3, 4)]), NO_TRIM),
        (
            raw("rows before " + ONE, [noise((1, 1), tile, 5)]),
            TrimPlan.of(TrimRequest(k_ratio=0.3, max_kept_fraction=0.4)),
        ),
        (
            raw(TWO_APART, [noise((1, 2), tile, 6), noise((2, 1), tile, 7)]),
            TrimPlan.of(TrimRequest(k_ratio=0.05, merge_ratio=0.2)),
        ),
    ]
    prompts = [pair.ours.prepare(prompt) for prompt, _ in requests]

    def fresh_rows() -> list[SequenceRows]:
        pool = pair.pool
        return [
            pair.ours.prompt_rows(prompt, pair.encoded(prompt, trim), trim, pair.granted(prompt, 1, pool))
            for prompt, (_, trim) in zip(prompts, requests, strict=True)
        ]

    together, apart = fresh_rows(), fresh_rows()
    logits = pair.ours.logits(together, [token for prompt in prompts for token in prompt.token_ids])
    alone = [pair.ours.logits([rows], prompt.token_ids) for rows, prompt in zip(apart, prompts, strict=True)]
    torch.testing.assert_close(logits, torch.cat(alone), atol=LOGITS, rtol=0)
    assert [kept(rows) for rows in together] == [kept(rows) for rows in apart]
    assert sum(kept(rows) is not None for rows in together) == 3

    tokens = [3, 14, 15, 9, 2]
    kvs_together, kvs_apart = ([rows.kv for rows in batch if rows.kv is not None] for batch in (together, apart))
    decoded = pair.ours.decode(tokens, kvs_together)
    one_by_one = [pair.ours.decode([token], [kv]) for token, kv in zip(tokens, kvs_apart, strict=True)]
    torch.testing.assert_close(decoded, torch.cat(one_by_one), atol=LOGITS, rtol=0)


def test_what_follows_a_prompt_is_what_its_last_row_says(pair: Pair) -> None:
    prompts = [pair.ours.prepare(raw(text, [])) for text in ("a few words", "and a good many more of them")]
    token_ids = [token for prompt in prompts for token in prompt.token_ids]
    every, last = (
        pair.ours.logits(
            [SequenceRows(len(prompt.token_ids), pair.pool.key_values(32), None) for prompt in prompts],
            token_ids,
            all_rows=all_rows,
        )
        for all_rows in (True, False)
    )
    rows = torch.tensor([len(prompt.token_ids) for prompt in prompts]).cumsum(0) - 1
    torch.testing.assert_close(last, every[rows], atol=LOGITS, rtol=0)


def kept(rows: SequenceRows) -> list[int] | None:
    """The features that a prefill kept; None when it was not trimmed."""
    if rows.vision is None or rows.vision.selection is None:
        return None
    return rows.vision.selection.kept.tolist()


def test_padding_tiles_are_neither_projected_nor_cached(pair: Pair) -> None:
    _, kv = pair.logits(raw(ONE, [noise((1, 1), pair.ours.info.tile_size)]))
    assert kv.cross_lengths[0] == pair.ours.info.features_per_tile


def test_the_cap_bounds_what_is_kept_of_each_image(pair: Pair) -> None:
    images = [noise((2, 2), pair.ours.info.tile_size, 1), noise((1, 1), pair.ours.info.tile_size, 2)]
    prepared = pair.ours.prepare(raw("<|image|><|image|>both", images))
    encoded_images = pair.encoded(prepared)
    kv = pair.granted(prepared)
    trim = TrimPlan.of(TrimRequest(k_ratio=0.9, max_kept_fraction=0.25, return_selection=True))
    prefilled = run_through(pair.ours.prefill(prepared, encoded_images, trim, kv))
    assert prefilled.num_kept == (10, 2)  # floor of a quarter of 40 and of 10
    assert kv.cross_lengths[0] == 12
    for selection, kept in zip(prefilled.selections, prefilled.num_kept, strict=True):
        assert sum(byte.bit_count() for byte in selection.kept) == kept
        assert len(selection.picks_by_head) == pair.ours.info.num_heads


def test_bfloat16_logits_follow_float32(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(Geometry(), dtype="bfloat16")
    image = noise((1, 1), pair.ours.info.tile_size)
    prompt = raw(ONE, [image])
    expected = pair.peer.logits(list(pair.ours.prepare(prompt).token_ids), [image])
    logits, kv = pair.logits(prompt)
    assert pair.ours.info.dtype == "bfloat16"
    assert kv.pages.dtype == torch.bfloat16
    assert (logits - expected).std() < LOGITS_BFLOAT16 * expected.std()
