"""The engine with a real, if random, model and adapters of it: each request gets what its merged model gives alone."""

import gc
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.engine.stepping import Output
from tests.engine.test_real_model import GREEDY, ONE, OTHER, SAMPLED, THREE, TRIMMED, UNTRIMMED
from tests.model.adapters import CONFIGS, save_adapter, save_merged
from trimserve.api.chunks import ImageSelection, Started, TokenDelta
from trimserve.api.prompt import RawPrompt
from trimserve.api.request import GenerationRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.engine import Engine
from trimserve.engine.sequence import Sequence
from trimserve.executor.local import LocalExecutor
from trimserve.model.adapters import Adapter
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

NAMES = ["vision", "cross", "text", "vocabulary"]

REQUESTS = [
    GenerationRequest("base", ONE, GREEDY, TRIMMED),
    GenerationRequest("vision", ONE, GREEDY, TRIMMED, adapter="vision"),
    GenerationRequest("cross", ONE, GREEDY, TRIMMED, adapter="cross"),
    GenerationRequest("text", ONE, GREEDY, TRIMMED, adapter="text"),
    GenerationRequest("vocabulary", THREE, GREEDY, UNTRIMMED, adapter="vocabulary"),
    GenerationRequest("cross, sampled", THREE, replace(SAMPLED, seed=3), TRIMMED, adapter="cross"),
    GenerationRequest("text alone", RawPrompt("just a few words"), GREEDY, TRIMMED, adapter="text"),
    GenerationRequest("base again", OTHER, replace(SAMPLED, seed=4), TRIMMED),
]

Answer = tuple[list[int], tuple[ImageSelection, ...]]


@dataclass(frozen=True)
class Adapted:
    """A model, folders of its adapters, and the models that they are together."""

    base: Mllama
    folders: dict[str, Path]
    merged: dict[str, Mllama]

    def executor(self, image_cache_bytes: int = 0) -> LocalExecutor:
        """Of the model, with all adapters."""
        executor = LocalExecutor(self.base, image_cache_bytes)
        for name, folder in self.folders.items():
            executor.load_adapter(name, folder)
        return executor


@pytest.fixture(scope="module")
def adapted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    folders = {name: save_adapter(tmp_path_factory.mktemp(name), checkpoint, CONFIGS[name]) for name in NAMES}
    merged = {name: save_merged(tmp_path_factory.mktemp("merged"), checkpoint, folders[name]) for name in NAMES}
    return Adapted(
        load_model(ModelConfig(model=str(checkpoint)), EngineConfig()),
        folders,
        {name: load_model(ModelConfig(model=str(folder)), EngineConfig()) for name, folder in merged.items()},
    )


def start(engine: Engine, *requests: GenerationRequest) -> tuple[list[Sequence], list[Output]]:
    outputs: list[Output] = [[] for _ in requests]
    sequences = [
        engine.prepare(request, output.append, time.monotonic())
        for request, output in zip(requests, outputs, strict=True)
    ]
    for sequence in sequences:
        engine.add(sequence)
    return sequences, outputs


def answers(outputs: list[Output]) -> list[Answer]:
    found = []
    for started, *rest in outputs:
        assert isinstance(started, Started), started
        tokens = [token_id for chunk in rest if isinstance(chunk, TokenDelta) for token_id in chunk.token_ids]
        assert len(tokens) == GREEDY.max_new_tokens
        found.append((tokens, started.selections))
    return found


def finish(engine: Engine, outputs: list[Output]) -> list[Answer]:
    while engine.has_work:
        engine.step()
    return answers(outputs)


def alone_in_merged_models(adapted: Adapted) -> list[Answer]:
    found = []
    for request in REQUESTS:
        model = adapted.base if request.adapter is None else adapted.merged[request.adapter]
        engine = Engine(model.processor, LocalExecutor(model), EngineConfig())
        found += finish(engine, start(engine, replace(request, adapter=None))[1])
    return found


def test_a_mixed_batch_gives_what_each_merged_model_gives_alone(adapted: Adapted) -> None:
    expected = alone_in_merged_models(adapted)
    assert len({tuple(tokens) for tokens, _ in expected}) == len(REQUESTS)
    engine = Engine(adapted.base.processor, adapted.executor(), EngineConfig())
    assert finish(engine, start(engine, *REQUESTS)[1]) == expected


def test_what_loses_its_pages_is_computed_again_with_its_adapter(adapted: Adapted) -> None:
    expected = alone_in_merged_models(adapted)
    engine = Engine(adapted.base.processor, adapted.executor(), EngineConfig())
    sequences, outputs = start(engine, *REQUESTS)
    num_preempted = 0
    for step in range(40):
        engine.step()
        sequence = sequences[step % len(sequences)]
        if step % 3 == 0 and sequence.holds_pages and sequence.num_generated_tokens > 1:
            engine.preempt(sequence)
            num_preempted += 1
    assert num_preempted >= 5
    assert finish(engine, outputs) == expected


def test_only_an_adapter_that_changes_visual_features_has_cached_images_of_its_own(adapted: Adapted) -> None:
    executor = adapted.executor(2**24)
    engine = Engine(adapted.base.processor, executor, EngineConfig())
    asked = ["base", "cross", "text", "vocabulary", "vision", "vision"]
    counts, used = [], []
    for name in asked:
        adapter = None if name == "base" else name
        finish(engine, start(engine, replace(REQUESTS[0], adapter=adapter))[1])
        counts.append((engine.image_cache.num_hits, engine.image_cache.num_misses))
        used.append(engine.image_cache.num_bytes)
    assert counts == [(0, 1), (1, 1), (2, 1), (3, 1), (3, 2), (4, 2)]
    one, kv_bytes = used[0], used[1] - used[0]  # `cross` and `vocabulary` change keys and values of the same features
    assert used == [one, one + kv_bytes, one + kv_bytes, one + 2 * kv_bytes, *[2 * one + 2 * kv_bytes] * 2]
    assert (engine.image_cache.num_kv_bytes, engine.image_cache.num_kv_hits) == (4 * kv_bytes, 2)
    engine.unload_adapter("vision")
    engine.unload_adapter("cross")
    finish(engine, start(engine, REQUESTS[0])[1])
    assert (engine.image_cache.num_hits, engine.image_cache.num_misses) == (5, 2)
    assert engine.image_cache.num_bytes == one + kv_bytes  # of `vocabulary`
    executor.load_adapter("vision", adapted.folders["vision"])
    finish(engine, start(engine, REQUESTS[1])[1])
    assert engine.image_cache.num_misses == 3


def test_nothing_of_an_adapter_is_held_once_it_is_unloaded(adapted: Adapted) -> None:
    engine = Engine(adapted.base.processor, adapted.executor(), EngineConfig())
    finish(engine, start(engine, *REQUESTS)[1])
    before = num_adapters_in_memory()
    names = {request.adapter for request in REQUESTS if request.adapter is not None}
    for name in names:
        engine.unload_adapter(name)
    assert num_adapters_in_memory() == before - len(names)


def num_adapters_in_memory() -> int:
    gc.collect()
    return sum(type(each) is Adapter for each in gc.get_objects())
