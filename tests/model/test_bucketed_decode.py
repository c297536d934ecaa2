"""Decode steps in fixed buffers give what ordinary steps give, at both edges of every bucket."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.model.conftest import NO_TRIM
from tests.model.random_checkpoint import Geometry, save_random_checkpoint
from tests.model.test_mllama import noise, raw
from tests.tolerances import LOGITS
from trimserve.api.trim import FixedCount, TrimRequest
from trimserve.config import Device, EngineConfig, ModelConfig
from trimserve.evaluation.pages import OwnKeyValues, OwnPages
from trimserve.model.bucketed_decode import Capture, CudaGraphs, Step
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.model.step_buffers import batch_buckets
from trimserve.trimming.plan import TrimPlan

MOST = 17
GEOMETRY = Geometry(num_layers=6, cross_layers=(0, 2, 5))
TILE = GEOMETRY.tile_size
CASCADE = TrimPlan.of(
    TrimRequest(policy="sparsevlm", budget=FixedCount(21), merge_ratio=0.1, parameters={"cascade_ratio": 0.5})
)
LATE_EXIT = TrimPlan.of(TrimRequest(policy="todre", budget=FixedCount(18), parameters={"late_exit_threshold": 1.0}))
KINDS = [
    ("nothing but words", [], NO_TRIM),
    ("an image<|image|>and words", [noise((1, 2), TILE)], NO_TRIM),
    ("other words", [], NO_TRIM),
    ("a trimmed<|image|>one", [noise((2, 2), TILE, 1)], TrimPlan.of(TrimRequest(k_ratio=0.1))),
    ("a merged<|image|>one", [noise((2, 2), TILE, 2)], TrimPlan.of(TrimRequest(k_ratio=0.1, merge_ratio=0.2))),
    ("less and less<|image|>of one", [noise((2, 2), TILE, 3)], CASCADE),
    ("one left<|image|>early", [noise((1, 2), TILE, 4)], LATE_EXIT),
]


@pytest.fixture(scope="module", params=[7, 6], ids=["a layer to a page", "three layers to a page"])
def model(tmp_path_factory: pytest.TempPathFactory, device: Device, request: pytest.FixtureRequest) -> Mllama:
    """A random checkpoint on a device, with three cross-attention layers and four or three others."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_checkpoint(folder, replace(GEOMETRY, num_layers=request.param))
    return load_model(ModelConfig(model=str(folder), device=device), EngineConfig())


@pytest.fixture(scope="module")
def pool(model: Mllama) -> OwnPages:
    """Pages for all."""
    return OwnPages(model.info, 2**24)


@pytest.fixture
def warm(model: Mllama, pool: OwnPages, monkeypatch: pytest.MonkeyPatch) -> Callable[[Capture], None]:
    """Lets the model take its steps in buffers until the test ends."""
    monkeypatch.setattr(model, "_bucketed", None)
    return partial(model.warm_up_decode, pool.pages, MOST)


def eagerly(step: Step) -> Step:
    """Captures nothing: the step runs op by op."""
    return step


@pytest.fixture
def capture(device: Device) -> Capture:
    """How the device captures steps."""
    return CudaGraphs() if device == "cuda" else eagerly


def prefilled(
    model: Mllama, pool: OwnPages, count: int, kinds: Sequence[int] = range(len(KINDS))
) -> list[OwnKeyValues]:
    """So many sequences, of the kinds in turn."""
    kvs = []
    for row in range(count):
        text, images, trim = KINDS[kinds[row % len(kinds)]]
        prompt = model.prepare(raw(text * (1 + row % 2), images * (1 + row % 2)))
        kv = pool.key_values(
            len(prompt.token_ids) + 8, sum(image.num_tiles for image in prompt.images) * model.info.features_per_tile
        )
        encoded = [run_through(model.encode_image(image, trim.needs)) for image in prompt.images]
        run_through(model.prefill(prompt, encoded, trim, kv))
        kvs.append(kv)
    return kvs


def steps(model: Mllama, kvs: Sequence[OwnKeyValues], count: int = 2) -> Tensor:
    """Logits [count, B, V] of steps with known tokens."""
    tokens = [[(7 * row + step) % 50 + 3 for row in range(len(kvs))] for step in range(count)]
    return torch.stack([model.decode(of_step, kvs).clone() for of_step in tokens])


@pytest.mark.parametrize(
    ("max_batch", "buckets"), [(1, [1]), (3, [1, 2, 4]), (8, [1, 2, 4, 8]), (17, [1, 2, 4, 8, 16, 24])]
)
def test_buckets_hold_the_largest_batch_and_no_more_than_it_needs(max_batch: int, buckets: list[int]) -> None:
    assert batch_buckets(max_batch) == buckets


@pytest.mark.parametrize(
    "kinds", [range(len(KINDS)), [0, 2], [3], [6, 5]], ids=["mixed", "text", "images", "later layers hold less"]
)
def test_a_batch_of_any_size_gets_the_logits_of_ordinary_steps(
    model: Mllama, pool: OwnPages, warm: Callable[[Capture], None], capture: Capture, kinds: Sequence[int]
) -> None:
    kvs = prefilled(model, pool, MOST, kinds)
    lengths = [kv.length for kv in kvs]
    batches = [kvs[:size] for size in (1, 2, 3, 4, 5, 8, 9, 16, 17)] + [kvs[:4], kvs[1:5], kvs[4:0:-1]]

    def run() -> list[Tensor]:
        results = []
        for batch in batches:
            for kv, length in zip(kvs, lengths, strict=True):
                kv.length = length
            results.append(steps(model, batch))
            assert sum(kv.length for kv in kvs) == sum(lengths) + 2 * len(batch)
        return results

    ordinary = run()
    warm(capture)
    for buffered, expected in zip(run(), ordinary, strict=True):
        torch.testing.assert_close(buffered, expected, atol=LOGITS, rtol=0)
    for kv in kvs:
        kv.release()


def test_several_rows_of_a_sequence_get_the_logits_that_one_after_another_get(
    model: Mllama, pool: OwnPages, warm: Callable[[Capture], None], capture: Capture
) -> None:
    kvs = prefilled(model, pool, 4)
    counts, tokens = [3, 1, 1, 4], [*range(3, 12)]
    rows, before = iter(tokens), [kv.length for kv in kvs]
    singly = [
        model.decode([next(rows)], [kv]).clone() for kv, count in zip(kvs, counts, strict=True) for _ in range(count)
    ]
    for kv, length in zip(kvs, before, strict=True):
        kv.length = length
    warm(capture)
    torch.testing.assert_close(model.decode(tokens, kvs, counts), torch.cat(singly), atol=LOGITS, rtol=0)
    for kv in kvs:
        kv.release()


def test_rows_that_pad_a_batch_change_no_page_but_the_last(
    model: Mllama, pool: OwnPages, warm: Callable[[Capture], None], capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kvs = prefilled(model, pool, 5)
    before, lengths = pool.pages.clone(), [kv.length for kv in kvs]
    warm(capture)
    torch.testing.assert_close(pool.pages[:-1], before[:-1], atol=0, rtol=0, equal_nan=True)
    steps(model, kvs, count=1)
    buffered = pool.pages[:-1].clone()
    for kv, length in zip(kvs, lengths, strict=True):
        kv.length = length
    monkeypatch.setattr(model, "_bucketed", None)
    pool.pages.copy_(before)
    steps(model, kvs, count=1)
    torch.testing.assert_close(buffered, pool.pages[:-1], atol=LOGITS, rtol=0, equal_nan=True)
    for kv in kvs:
        kv.release()


def test_a_larger_batch_and_another_pool_take_ordinary_steps(
    model: Mllama, pool: OwnPages, warm: Callable[[Capture], None]
) -> None:
    taken: list[int] = []

    def watched(step: Step) -> Step:
        def run() -> Tensor:
            logits = step()
            taken.append(len(logits))
            return logits

        return run

    warm(watched)
    other = OwnPages(model.info, 2**22)
    elsewhere = prefilled(model, other, 1)
    steps(model, elsewhere)
    assert taken == []
    kvs = prefilled(model, pool, 3)
    steps(model, kvs, count=1)
    assert taken == [4]
    many = prefilled(model, pool, 25, [0])
    steps(model, many, count=1)
    assert taken == [4]
    for kv in (*kvs, *many):
        kv.release()


def test_every_bucket_is_captured_with_and_without_images_largest_first(warm: Callable[[Capture], None]) -> None:
    sizes: list[int] = []

    def capture(step: Step) -> Step:
        sizes.append(len(step()))
        return step

    warm(capture)
    assert sizes == [24, 24, 16, 16, 8, 8, 4, 4, 2, 2, 1, 1]
