"""Keys and values that an image keeps: an answer is the same to the last bit, and little is computed twice."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.model.conftest import NO_TRIM, Pair
from tests.model.random_checkpoint import Geometry
from tests.model.test_mllama import ONE, THREE_MIXED, noise, raw
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.model.decoder_layers import CrossLayer
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.model.prefilled import Prefilled
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.feature_kv import FeatureKeyValues
from trimserve.trimming.plan import TrimPlan

PLANS = {
    "untrimmed": NO_TRIM,
    "trimmed": TrimPlan.of(TrimRequest(k_ratio=0.1)),
    "merged": TrimPlan.of(TrimRequest(k_ratio=0.05, merge_ratio=0.2)),
    "chosen from the image": TrimPlan.of(TrimRequest(policy="divprune", budget=FixedRatio(0.3))),
    "trimmed layer by layer": TrimPlan.of(
        TrimRequest(policy="sparsevlm", budget=FixedRatio(0.5), merge_ratio=0.2, parameters={"cascade_ratio": 0.6})
    ),
}


@pytest.fixture(scope="module")
def deep(make_pair: Callable[..., Pair]) -> Pair:
    """Three cross-attention layers."""
    return make_pair(Geometry(num_layers=6, cross_layers=(0, 2, 5)))


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Features of each product that makes keys and values."""
    counts: list[int] = []
    keys_values = CrossLayer.keys_values

    def counting(layer: CrossLayer, features: Tensor, adapters: None) -> tuple[Tensor, Tensor]:
        counts.append(len(features))
        return keys_values(layer, features, adapters)

    monkeypatch.setattr(CrossLayer, "keys_values", counting)
    return counts


def keep(images: list[EncodedImage]) -> list[EncodedImage]:
    """As a cache does that has room for everything."""
    for image in images:
        image.keys_values[b""] = FeatureKeyValues(image.num_features, image.num_kv_layers)
    return images


def ask(pair: Pair, prompt: PreparedPrompt, images: list[EncodedImage], plan: TrimPlan) -> tuple[Prefilled, Tensor]:
    """A prefill, and all pages behind it."""
    kv = pair.granted(prompt)
    kv.pages.zero_()
    return run_through(pair.ours.prefill(prompt, images, plan, kv)), kv.pages


@pytest.mark.parametrize("plan", PLANS)
def test_questions_on_known_images_are_answered_as_if_they_were_new(
    deep: Pair, projected: list[int], plan: str
) -> None:
    trim, size = PLANS[plan], deep.ours.info.tile_size
    pictures = [noise(grid, size, seed) for seed, grid in enumerate([(2, 2), (1, 1), (1, 2)])]
    known = keep(deep.encoded(deep.ours.prepare(raw(THREE_MIXED, pictures)), trim))
    for number, text in enumerate([THREE_MIXED, "<|image|>one<|image|>two<|image|>three", THREE_MIXED]):
        prompt = deep.ours.prepare(raw(text, pictures))
        expected, expected_pages = ask(deep, prompt, deep.encoded(prompt, trim), trim)
        anew = sum(projected)
        projected.clear()
        answer, pages = ask(deep, prompt, known, trim)
        assert torch.equal(answer.logits, expected.logits)
        assert torch.equal(pages, expected_pages)
        assert answer.layer_rows == expected.layer_rows
        assert sum(projected) == anew if number == 0 else sum(projected) < anew
        projected.clear()


def test_a_layer_projects_what_no_question_has_needed_before(deep: Pair, projected: list[int]) -> None:
    picture = noise((2, 2), deep.ours.info.tile_size)
    prompt = deep.ours.prepare(raw(ONE, [picture]))
    known, num_layers = keep(deep.encoded(prompt)), deep.ours.info.num_cross_attention_layers
    num_features = known[0].num_features
    trimmed, _ = ask(deep, prompt, known, PLANS["trimmed"])
    [num_kept] = trimmed.num_kept
    assert projected == [num_features, *[num_kept] * (num_layers - 1)]
    projected.clear()
    ask(deep, prompt, known, NO_TRIM)
    assert projected == [num_features - num_kept] * (num_layers - 1)
    projected.clear()
    ask(deep, prompt, known, PLANS["trimmed"])
    ask(deep, prompt, known, NO_TRIM)
    assert projected == []


@pytest.mark.parametrize(("dtype", "quantize"), [*product(["float32", "bfloat16"], ["none", "int8", "int4"])])
def test_keys_and_values_of_a_feature_do_not_depend_on_the_others(deep: Pair, dtype: str, quantize: str) -> None:
    config = ModelConfig(model=str(deep.folder), dtype=dtype, quantize=quantize)  # type: ignore[arg-type]  # names
    layer = next(each for each in load_model(config, EngineConfig())._decoder._layers if isinstance(each, CrossLayer))
    features = torch.randn(1100, deep.ours.info.hidden_size, dtype=getattr(torch, dtype))
    everything = layer.keys_values(features, None)
    for num in (1, 17, 511, 513, 1024):
        some = torch.randperm(len(features))[:num].sort().values
        for rows, of_all in zip(layer.keys_values(features[some], None), everything, strict=True):
            assert torch.equal(rows, of_all[some])


def test_only_whole_layers_are_known_on_other_devices() -> None:
    known = FeatureKeyValues(5, num_layers=2)
    assert [known.serves(layer, None) for layer in range(3)] == [True, True, False]
    some = torch.tensor([0, 3])
    assert known.serves(0, some)
    assert not known.serves(0, some.to("meta"))
