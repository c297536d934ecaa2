"""The engine on each device: requests of every kind end well, and no tensor is made where the model is not."""

import io
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from tests.engine.stepping import make_engine
from tests.model.random_checkpoint import Geometry, equip
from trimserve.api.chunks import Finished, GenerationChunk, Started, TokenDelta
from trimserve.api.prompt import ImageFile, RawPrompt
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.config import Device, EngineConfig, ModelConfig, Quantize
from trimserve.engine.engine import Engine
from trimserve.engine.warm_up import warm_up
from trimserve.errors import TrimserveError
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.trimming.policies.table import POLICIES

GEOMETRY = Geometry()
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.2, num_top_logprobs=2, seed=5)
UNTRIMMED = TrimRequest(enabled=False)
PARAMETERS = {"sparsevlm": {"recycle_ratio": 1.0, "cascade_ratio": 0.5}, "todre": {"late_exit_threshold": 1.0}}
"""Of policies that do more with them."""


@pytest.fixture(scope="module")
def equipped(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Mllama:
    """The checkpoint on the CPU, with all that policies need."""
    codebook = tmp_path_factory.mktemp("codebook") / "codebook.safetensors"
    return load_model(equip(ModelConfig(model=str(checkpoint), device="cpu"), codebook), EngineConfig())


def load(folder: Path, device: Device, quantize: Quantize = "none") -> Mllama:
    """Load it."""
    return load_model(ModelConfig(model=str(folder), device=device, quantize=quantize), EngineConfig())


@pytest.fixture(scope="module")
def equipped_there(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, device: Device) -> Mllama:
    """As `equipped`, on the device."""
    codebook = tmp_path_factory.mktemp("codebook") / "codebook.safetensors"
    return load_model(equip(ModelConfig(model=str(checkpoint), device=device), codebook), EngineConfig())


def noise(high: int, wide: int, seed: int) -> ImageFile:
    """An image file of so many tiles."""
    shape = (high * GEOMETRY.tile_size, wide * GEOMETRY.tile_size, 3)
    buffer = io.BytesIO()
    PilImage.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(buffer, "PNG")
    return ImageFile(buffer.getvalue())


TWO = RawPrompt("A pair<|image|><|image|>of images", (noise(2, 1, 1), noise(1, 2, 2)))
MIX = [
    GenerationRequest("text", RawPrompt("just a few words"), GREEDY, UNTRIMMED),
    GenerationRequest("untrimmed", RawPrompt("Look:<|image|>What is this?", (noise(2, 2, 3),)), GREEDY, UNTRIMMED),
    GenerationRequest("trimmed", RawPrompt("Look:<|image|>What?", (noise(2, 2, 4),)), GREEDY, TrimRequest(k_ratio=0.1)),
    GenerationRequest("merged", TWO, SAMPLED, TrimRequest(k_ratio=0.1, merge_ratio=0.2, return_selection=True)),
    GenerationRequest("more text", RawPrompt("other words, and more"), SAMPLED, UNTRIMMED),
]


def generate(engine: Engine, *requests: GenerationRequest, default_device: str = "cpu") -> list[list[int]]:
    """Tokens of each, generated together by an engine whose thread makes tensors on another device by default."""
    outputs: list[list[GenerationChunk | TrimserveError]] = [[] for _ in requests]
    for request, output in zip(requests, outputs, strict=True):
        engine.add(engine.prepare(request, output.append, time.monotonic()))
    with torch.device(default_device):
        while engine.has_work:
            engine.step()
    for started, *_, last in outputs:
        assert isinstance(started, Started)
        assert isinstance(last, Finished), last
    return [
        [token_id for chunk in output if isinstance(chunk, TokenDelta) for token_id in chunk.token_ids]
        for output in outputs
    ]


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_mix_of_requests_gets_the_tokens_that_the_cpu_gives(
    checkpoint: Path, device: Device, quantize: Quantize
) -> None:
    # In float32 nothing is so close that another order of sums decides it.
    expected = generate(make_engine(load(checkpoint, "cpu", quantize), max_batch=len(MIX)), *MIX)
    engine = make_engine(load(checkpoint, device, quantize), max_batch=len(MIX), kv_cache_bytes=2**24)
    warm_up(engine)
    assert engine.info.device.startswith(device)
    assert generate(engine, *MIX) == expected
    assert generate(engine, *reversed(MIX)) == expected[::-1]


def requests_of(policy: str) -> list[GenerationRequest]:
    """One that is trimmed by a policy, and one of text."""
    parameters = PARAMETERS.get(policy, {})
    trim = TrimRequest(policy=policy, k_ratio=0.1, merge_ratio=0.2, return_selection=True, parameters=parameters)
    few = replace(SAMPLED, max_new_tokens=5)
    return [GenerationRequest("a", TWO, few, trim), replace(MIX[0], sampling=few)]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_the_tokens_that_it_gives_on_the_cpu(
    equipped: Mllama, equipped_there: Mllama, policy: str, device: Device
) -> None:
    if device == "cpu":
        pytest.skip("compares another device with it")
    requests = requests_of(policy)
    expected = generate(make_engine(equipped, max_batch=2), *requests)
    assert generate(make_engine(equipped_there, max_batch=2, kv_cache_bytes=2**24), *requests) == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_every_tensor_is_made_on_a_device_that_is_named(equipped: Mllama, policy: str) -> None:
    # On meta, tensors have no values: whatever is made there by default breaks what it meets.
    requests = requests_of(policy)
    expected = generate(make_engine(equipped, max_batch=2), *requests)
    assert generate(make_engine(equipped, max_batch=2), *requests, default_device="meta") == expected
