"""The engine with a real, if random, model: what is batched together changes nothing."""

import io
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from tests.engine.stepping import make_engine
from tests.model.random_checkpoint import Geometry
from trimserve.api.chunks import Finished, GenerationChunk, ImageSelection, Started, TokenDelta
from trimserve.api.prompt import ImageFile, RawPrompt
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.errors import TrimserveError
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.trimming.budget import Allowance
from trimserve.trimming.encoded_image import Choice
from trimserve.trimming.policies.policy import Policy
from trimserve.trimming.policies.table import POLICIES

GEOMETRY = Geometry()
NUM_NEW = 24


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Mllama:
    """The checkpoint as it is."""
    return load_model(ModelConfig(model=str(checkpoint)), EngineConfig())


@pytest.fixture(scope="module")
def int8(checkpoint: Path) -> Mllama:
    """The checkpoint with keys and values in int8."""
    return load_model(ModelConfig(model=str(checkpoint), kv_dtype="int8"), EngineConfig())


def noise(high: int, wide: int, seed: int) -> ImageFile:
    """An image file of so many tiles."""
    shape = (high * GEOMETRY.tile_size, wide * GEOMETRY.tile_size, 3)
    buffer = io.BytesIO()
    PilImage.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(buffer, "PNG")
    return ImageFile(buffer.getvalue())


GREEDY = SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=1.0, top_p=0.95, repetition_penalty=1.2)
UNTRIMMED = TrimRequest(enabled=False, return_selection=True)
TRIMMED = TrimRequest(k_ratio=0.1, return_selection=True)

ONE = RawPrompt("Look:<|image|>What is this?", (noise(2, 2, 1),))
OTHER = RawPrompt("Look:<|image|>What is this?", (noise(2, 2, 2),))
THREE = RawPrompt("<|image|><|image|>a pair, and later<|image|>", (noise(2, 1, 3), noise(1, 1, 4), noise(1, 3, 5)))

REQUESTS = [
    GenerationRequest("text, greedy", RawPrompt("just a few words"), GREEDY, TRIMMED),
    GenerationRequest("text, sampled", RawPrompt("just a few words"), replace(SAMPLED, seed=1), TRIMMED),
    GenerationRequest("one, trimmed, greedy", ONE, GREEDY, TRIMMED),
    GenerationRequest("one, trimmed, sampled", ONE, replace(SAMPLED, seed=2), TRIMMED),
    GenerationRequest("another, trimmed, greedy", OTHER, GREEDY, TRIMMED),
    GenerationRequest("three, untrimmed, greedy", THREE, GREEDY, UNTRIMMED),
    GenerationRequest("three, trimmed, sampled", THREE, replace(SAMPLED, seed=3), TRIMMED),
]


def generate(model: Mllama, *requests: GenerationRequest) -> list[tuple[list[int], tuple[ImageSelection, ...]]]:
    """Tokens and kept features of each, generated together."""
    engine = make_engine(model, max_batch=len(REQUESTS))
    outputs: list[list[GenerationChunk | TrimserveError]] = [[] for _ in requests]
    for request, output in zip(requests, outputs, strict=True):
        engine.add(engine.prepare(request, output.append, time.monotonic()))
    while engine.has_work:
        engine.step()
    assert engine.pool.used_self_bytes == engine.pool.used_cross_bytes == 0
    results = []
    for started, *rest in outputs:
        assert isinstance(started, Started)
        token_ids = [token_id for chunk in rest if isinstance(chunk, TokenDelta) for token_id in chunk.token_ids]
        assert len(token_ids) == NUM_NEW
        results.append((token_ids, started.selections))
    return results


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_a_mixed_batch_gives_the_tokens_and_the_kept_features_that_each_gives_alone(
    model: Mllama, int8: Mllama, kv_dtype: str
) -> None:
    model = int8 if kv_dtype == "int8" else model
    assert model.info.kv_dtype == kv_dtype
    alone = [generate(model, request)[0] for request in REQUESTS]
    assert generate(model, *REQUESTS) == alone
    assert generate(model, *reversed(REQUESTS)) == alone[::-1]
    # No two would be confused unseen, and trimming did trim.
    assert len({tuple(token_ids) for token_ids, _ in alone}) == len(REQUESTS)
    num_kept = [[int.from_bytes(image.kept, "little").bit_count() for image in images] for _, images in alone]
    assert num_kept[5] == [20, 10, 30]
    assert num_kept[2][0] < 40
    assert alone[2][1] != alone[4][1]


def test_the_stages_of_a_request_lie_where_they_belong(model: Mllama) -> None:
    output: list[GenerationChunk | TrimserveError] = []
    engine = make_engine(model, max_batch=1)
    submitted_at = time.monotonic()
    engine.add(engine.prepare(replace(REQUESTS[6], request_id="timed"), output.append, submitted_at))
    while engine.has_work:
        engine.step()
    started, last = output[0], output[-1]
    assert isinstance(started, Started)
    assert isinstance(last, Finished)
    assert [span.stage for span in started.spans] == [
        *["image_decode"] * 3,
        "queue",
        "vision_encode",
        "trim_select",
        "trim_gather",
        "prefill",
    ]
    assert all(span.begin < span.end for span in started.spans)
    queue, vision, select, gather, prefill = started.spans[3:]
    assert queue.begin == submitted_at
    assert all(queue.begin <= image.begin and image.end <= queue.end for image in started.spans[:3])
    assert (vision.begin, prefill.begin) == (queue.end, vision.end)
    assert prefill.begin < select.begin < select.end == gather.begin < gather.end < prefill.end
    times = last.timings
    assert 0 < times.image_decode_seconds < times.preprocess_seconds
    assert 0 < times.trim_select_seconds < times.prefill_seconds
    assert 0 < times.trim_gather_seconds < times.prefill_seconds
    assert 0 < times.detokenize_seconds < times.decode_seconds


@pytest.mark.parametrize(("name", "num_asked"), [("cls", 1), ("divprune", 1), ("mean", 2)])
def test_only_what_was_chosen_from_an_image_alone_serves_a_second_question_on_it(
    model: Mllama, monkeypatch: pytest.MonkeyPatch, name: str, num_asked: int
) -> None:
    policy = POLICIES[name]
    asked = []
    choose = policy.choose  # type: ignore[attr-defined]  # every policy has one

    def watched(self: Policy, image: object, allowance: Allowance) -> Choice:
        asked.append(image)
        choice: Choice = choose(self, image, allowance)
        return choice

    monkeypatch.setattr(policy, "choose", watched)
    engine = make_engine(model, max_batch=1, image_cache_bytes=2**22)
    trim = TrimRequest(policy=name, budget=FixedRatio(0.3), return_selection=True)
    outputs: list[list[GenerationChunk | TrimserveError]] = [[], []]
    for text, output in zip(("What is this?", "How many are there?"), outputs, strict=True):
        request = GenerationRequest(text, RawPrompt(f"<|image|>{text}", ONE.images), GREEDY, trim)
        engine.add(engine.prepare(request, output.append, time.monotonic()))
    while engine.has_work:
        engine.step()
    assert len(asked) == num_asked
    for output in outputs:
        assert isinstance(output[-1], Finished)
        assert 0 < output[-1].timings.trim_select_seconds < output[-1].timings.prefill_seconds
