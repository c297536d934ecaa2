"""A model with a guide: the guide looks, the model keeps."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.model.conftest import Pair
from tests.model.random_checkpoint import Geometry, save_random_checkpoint
from tests.model.test_mllama import ONE, TWO_APART, noise, raw
from tests.tolerances import LOGITS
from trimserve.api.prompt import Prompt
from trimserve.api.trim import FixedRatio, TopP, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.memory import memory_by_kind, prefill_scratch_bytes
from trimserve.errors import CheckpointError
from trimserve.model.interruptible import run_through
from trimserve.model.loading import describe_model, load_model
from trimserve.model.mllama import Mllama
from trimserve.model.prefilled import Prefilled
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.plan import TrimPlan

OTHER = Geometry(num_kv_heads=1, heads_per_kv=8, head_dim=8, num_layers=4, cross_layers=(2,), vision_layers=3)
"""Another decoder, with more heads, on the same patch grid."""


@pytest.fixture(scope="module")
def other(make_pair: Callable[..., Pair]) -> Pair:
    """A checkpoint of its own that may be a guide."""
    return make_pair(OTHER, seed=7)


@pytest.fixture(scope="module")
def guided(pair: Pair, other: Pair) -> Mllama:
    """The usual model, and `other` as its guide."""
    return load_model(ModelConfig(model=str(pair.folder), guide_model=str(other.folder)), EngineConfig())


def two_images(pair: Pair) -> Prompt:
    tile = pair.ours.info.tile_size
    return raw(TWO_APART, [noise((2, 2), tile, 1), noise((1, 2), tile, 2)])


def prefilled(model: Mllama, pair: Pair, prompt: Prompt, trim: TrimRequest) -> Prefilled:
    """A prompt read by a model with the pair's geometry of keys and values."""
    prepared, plan = model.prepare(prompt), TrimPlan.of(trim)
    images = [run_through(model.encode_image(image, plan.needs)) for image in prepared.images]
    result: Prefilled = run_through(model.prefill(prepared, images, plan, pair.granted(prepared)))
    return result


TRIMS = [
    TrimRequest(k_ratio=0.05, return_selection=True),
    TrimRequest(k_ratio=0.1, max_kept_fraction=0.3, return_selection=True),
    TrimRequest(budget=FixedRatio(0.3), return_selection=True),
    TrimRequest(budget=TopP(0.2), return_selection=True),
]


@pytest.mark.parametrize("trim", TRIMS)
def test_a_model_that_guides_itself_keeps_what_trimmed_keeps(equipped: Pair, trim: TrimRequest) -> None:
    prompt = two_images(equipped)
    trimmed = prefilled(equipped.ours, equipped, prompt, trim)
    own = prefilled(equipped.ours, equipped, prompt, replace(trim, policy="guided"))
    assert own.selections == trimmed.selections
    assert own.num_kept == trimmed.num_kept < trimmed.num_valid


@pytest.mark.parametrize("trim", TRIMS)
def test_what_the_guide_would_keep_is_kept(guided: Mllama, pair: Pair, other: Pair, trim: TrimRequest) -> None:
    prompt = two_images(pair)
    chosen = prefilled(guided, pair, prompt, replace(trim, policy="guided"))
    assert chosen.selections == prefilled(other.ours, other, prompt, trim).selections
    assert chosen.selections != prefilled(pair.ours, pair, prompt, trim).selections
    assert len(chosen.selections[0].picks_by_head) == other.ours.info.num_heads
    assert chosen.trim_times is not None
    assert chosen.trim_times.began_at < chosen.trim_times.selected_at


def test_the_decoder_gets_only_what_was_chosen_alone_and_in_a_batch(guided: Mllama, pair: Pair) -> None:
    trim = TrimPlan.of(TrimRequest(policy="guided", k_ratio=0.1))
    tile = pair.ours.info.tile_size
    prompts = [guided.prepare(two_images(pair)), guided.prepare(raw(ONE, [noise((1, 1), tile, 3)]))]
    images = [[run_through(guided.encode_image(image)) for image in prompt.images] for prompt in prompts]
    pool = pair.pool
    rows = [
        guided.prompt_rows(prompt, of_prompt, trim, pair.granted(prompt, pool=pool))
        for prompt, of_prompt in zip(prompts, images, strict=True)
    ]
    together = guided.logits(rows, [token for prompt in prompts for token in prompt.token_ids])
    for prompt, of_prompt, own, logits in zip(
        prompts, images, rows, together.split([len(prompt.token_ids) for prompt in prompts]), strict=True
    ):
        assert own.vision is not None
        assert own.vision.selection is not None
        everything = torch.cat([image.features for image in of_prompt])[own.vision.selection.kept]
        kept = [EncodedImage(part, 1) for part in everything.split(own.vision.selection.num_kept)]
        untrimmed = TrimPlan.of(TrimRequest(enabled=False))
        alone = guided.prompt_rows(prompt, kept, untrimmed, pair.granted(prompt, pool=pool))
        torch.testing.assert_close(guided.logits([alone], prompt.token_ids), logits, atol=LOGITS, rtol=0)
        whole = guided.prompt_rows(prompt, of_prompt, untrimmed, pair.granted(prompt, pool=pool))
        assert (guided.logits([whole], prompt.token_ids) - logits).abs().max() > 100 * LOGITS


def test_the_guide_sees_an_image_once_and_there_is_room_for_what_it_sees(guided: Mllama, pair: Pair) -> None:
    prompt = guided.prepare(raw(ONE, [noise((1, 2), pair.ours.info.tile_size)]))
    [image] = [run_through(guided.encode_image(image)) for image in prompt.images]
    before = image.nbytes
    trim = TrimPlan.of(TrimRequest(policy="guided", k_ratio=0.1))
    seen = []
    for _ in range(2):
        guided.prompt_rows(prompt, [image], trim, pair.granted(prompt))
        assert image.guide is not None
        seen.append(image.guide)
    assert seen[0] is seen[1]
    assert image.nbytes == before
    assert before - run_through(pair.ours.encode_image(prompt.images[0])).nbytes == seen[0].features.nbytes


def test_a_guide_is_part_of_the_account(guided: Mllama, pair: Pair, other: Pair) -> None:
    info, alone, guide = guided.info, pair.ours.info, other.ours.info
    of_guide = prefill_scratch_bytes(guide) + guide.vision_scratch_bytes
    assert prefill_scratch_bytes(info) == prefill_scratch_bytes(alone) + of_guide
    assert memory_by_kind(info, 0, 0)["weights"] == alone.weight_bytes + guide.weight_bytes


@pytest.mark.parametrize(
    "geometry", [Geometry(patches_per_side=4), Geometry(patch_size=4, patches_per_side=6), Geometry(max_tiles=2)]
)
def test_a_guide_of_another_patch_grid_is_refused(
    pair: Pair, tmp_path_factory: pytest.TempPathFactory, geometry: Geometry
) -> None:
    folder = tmp_path_factory.mktemp("guide")
    save_random_checkpoint(folder, geometry)
    config = ModelConfig(model=str(pair.folder), guide_model=str(folder))
    both = (
        rf"{folder.name} has up to {geometry.max_tiles} tiles of .*, {pair.folder.name} has up to 4 tiles of 24 pixels"
    )
    with pytest.raises(CheckpointError, match=both):
        describe_model(config, EngineConfig())


def test_a_model_tells_which_policies_lack_what_they_need(pair: Pair, equipped: Pair) -> None:
    def available(model: Mllama) -> dict[str, bool]:
        return {policy.name: policy.is_available for policy in model.info.policy_details if policy.knob}

    assert {"codebook", "guided", "exit", "quecc"} <= available(pair.ours).keys()
    assert not any(available(pair.ours).values())
    assert all(available(equipped.ours).values())
