"""Requests with LoRA adapters against models into which PEFT itself merged them."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model.adapters import CONFIGS, edit_tensors, save_adapter, save_merged, spell_as_before
from tests.model.conftest import NO_TRIM, Pair
from tests.model.peer import Peer
from tests.model.test_mllama import ONE, TWO_APART, noise, raw
from tests.tolerances import LOGITS, LOGITS_BFLOAT16
from trimserve.api.trim import TrimRequest
from trimserve.config import Dtype, EngineConfig, ModelConfig
from trimserve.evaluation.pages import OwnKeyValues, OwnPages
from trimserve.model.adapters import Adapter
from trimserve.model.int8 import to_int8
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.plan import TrimPlan

TRIM = TrimPlan.of(TrimRequest(k_ratio=0.1, merge_ratio=0.1))

STEPS = [[5, 17, 9, 40, 3, 8], [11, 2, 30, 6, 7, 21], [4, 4, 12, 90, 1, 77]]
"""Tokens that follow the prompts, step by step."""


@dataclass(frozen=True)
class Adapted:
    """An adapter of the usual checkpoint, and the model that they are together."""

    folder: Path
    adapter: Adapter | None
    merged: Pair


@pytest.fixture(scope="module")
def adapted(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapted]:
    """Every kind, and the base model."""
    made = {"base": Adapted(pair.folder, None, pair)}
    for seed, (name, settings) in enumerate(CONFIGS.items()):
        folder = save_adapter(tmp_path_factory.mktemp(name), pair.folder, settings, seed)
        merged = save_merged(tmp_path_factory.mktemp("merged"), pair.folder, folder)
        ours = load_model(ModelConfig(model=str(merged)), EngineConfig())
        made[name] = Adapted(folder, pair.ours.load_adapter(folder), Pair(merged, ours, Peer(merged)))
    return made


def encoded(model: Mllama, prompt: PreparedPrompt, trim: TrimPlan, adapter: Adapter | None) -> list[EncodedImage]:
    return [run_through(model.encode_image(image, trim.needs, adapter)) for image in prompt.images]


def granted(pair: Pair, prompt: PreparedPrompt, pool: OwnPages, adapter: Adapter | None) -> OwnKeyValues:
    kv = pair.granted(prompt, 16, pool)
    kv.adapter = adapter
    return kv


@pytest.mark.parametrize("name", CONFIGS)
def test_every_row_of_a_prompt_equals_the_merged_model_of_the_peer(
    pair: Pair, adapted: dict[str, Adapted], name: str
) -> None:
    images = [noise((1, 2), pair.ours.info.tile_size, 1), noise((2, 2), pair.ours.info.tile_size, 2)]
    prompt = pair.ours.prepare(raw(TWO_APART, images))
    each, adapter = adapted[name], adapted[name].adapter
    kv = granted(pair, prompt, pair.pool, adapter)
    rows = pair.ours.prompt_rows(prompt, encoded(pair.ours, prompt, NO_TRIM, adapter), NO_TRIM, kv)
    expected = each.merged.peer.logits(list(prompt.token_ids), images)
    assert (pair.peer.logits(list(prompt.token_ids), images) - expected).abs().max() > 1000 * LOGITS
    torch.testing.assert_close(pair.ours.logits([rows], prompt.token_ids), expected, atol=LOGITS, rtol=0)


def prompts(pair: Pair) -> list[PreparedPrompt]:
    """Without an image, with one, and with two of which decoded rows see the last."""
    tile = pair.ours.info.tile_size
    return [
        pair.ours.prepare(raw(text, images))
        for text, images in [
            ("just words", []),
            (ONE, [noise((2, 2), tile, 1)]),
            (TWO_APART, [noise((1, 1), tile, 2), noise((1, 3), tile, 3)]),
        ]
    ]


def decoded(
    pair: Pair,
    batch: list[tuple[PreparedPrompt, Adapter | None]],
    tokens: list[list[int]],
    pool: OwnPages | None = None,
) -> list[Tensor]:
    """Logits that follow the prompts and each of the tokens, which are decoded in one batch."""
    pool, kvs, logits = pool or pair.pool, [], []
    for prompt, adapter in batch:
        kv = granted(pair, prompt, pool, adapter)
        images = encoded(pair.ours, prompt, TRIM, adapter)
        logits.append([run_through(pair.ours.prefill(prompt, images, TRIM, kv)).logits])
        kvs.append(kv)
    for step in zip(*tokens, strict=True):
        for row, each in zip(pair.ours.decode(step, kvs).clone(), logits, strict=True):
            each.append(row)
    return [torch.stack(each) for each in logits]


@pytest.mark.parametrize("way", ["on pages", "in buffers"])
def test_a_mixed_batch_equals_each_merged_model(
    pair: Pair, adapted: dict[str, Adapted], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    kinds = [*adapted.values(), adapted["base"], adapted["cross"]]
    batch = [(prompts(pair)[(index + index // 3) % 3], kind.adapter) for index, kind in enumerate(kinds)]
    tokens = [STEPS[index % 3] for index in range(len(batch))]
    pool = pair.pool
    if way == "in buffers":
        monkeypatch.setattr(pair.ours, "_bucketed", None)
        pair.ours.warm_up_decode(pool.pages, 16, lambda step: step)
    mixed = decoded(pair, batch, tokens, pool)
    for kind, (prompt, adapter), own, logits in zip(kinds, batch, tokens, mixed, strict=True):
        [merged] = decoded(kind.merged, [(prompt, None)], [own])
        torch.testing.assert_close(logits, merged, atol=LOGITS * merged.std().item(), rtol=0)
        [alone] = decoded(pair, [(prompt, adapter)], [own])
        torch.testing.assert_close(logits, alone, atol=LOGITS, rtol=0)


def test_several_prompts_with_adapters_of_their_own_are_read_together(pair: Pair, adapted: dict[str, Adapted]) -> None:
    read, pool = prompts(pair), pair.pool
    names = ["text", "base", "cross"]
    rows = []
    for prompt, name in zip(read, names, strict=True):
        adapter = adapted[name].adapter
        kv = granted(pair, prompt, pool, adapter)
        rows.append(pair.ours.prompt_rows(prompt, encoded(pair.ours, prompt, NO_TRIM, adapter), NO_TRIM, kv))
    together = pair.ours.logits(rows, [token for prompt in read for token in prompt.token_ids], all_rows=False)
    for prompt, name, logits in zip(read, names, together, strict=True):
        other = adapted[name].merged
        alone = other.ours.prompt_rows(prompt, other.encoded(prompt), NO_TRIM, other.granted(prompt, 16))
        expected = other.ours.logits([alone], prompt.token_ids)[-1]
        torch.testing.assert_close(logits, expected, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_of_before_transformers_4_52_mean_the_same(
    pair: Pair, adapted: dict[str, Adapted], tmp_path: Path, name: str
) -> None:
    save_adapter(tmp_path, pair.folder, CONFIGS[name], [*CONFIGS].index(name))
    edit_tensors(tmp_path, spell_as_before)
    read, adapter = pair.ours.load_adapter(tmp_path), adapted[name].adapter
    assert adapter is not None
    assert (read.modules, read.rank) == (adapter.modules, adapter.rank)
    assert [bool(key) for key in (read.image_key, read.kv_key)] == [bool(adapter.image_key), bool(adapter.kv_key)]
    for module, change in adapter.changes.items():
        for part in ("down", "up", "weight", "added"):
            torch.testing.assert_close(getattr(read.changes[module], part), getattr(change, part), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_of_an_int8_model_change_what_its_rounded_weights_give(
    pair: Pair, adapted: dict[str, Adapted], tmp_path: Path, dtype: Dtype
) -> None:
    quantized = load_model(ModelConfig(model=str(pair.folder), dtype=dtype, quantize="int8"), EngineConfig())
    save_rounded(tmp_path / "rounded", pair.folder)
    image = noise((1, 2), pair.ours.info.tile_size, 1)
    prompt = quantized.prepare(raw(ONE, [image]))
    for name in ("text", "cross", "vocabulary"):
        merged = Peer(save_merged(tmp_path / name, tmp_path / "rounded", adapted[name].folder))
        expected = merged.logits(list(prompt.token_ids), [image])
        adapter = quantized.load_adapter(adapted[name].folder)
        kv = OwnPages(quantized.info, 2**24).key_values(len(prompt.token_ids) + 4, 2 * quantized.info.features_per_tile)
        kv.adapter = adapter
        rows = quantized.prompt_rows(prompt, encoded(quantized, prompt, NO_TRIM, adapter), NO_TRIM, kv)
        logits = quantized.logits([rows], prompt.token_ids)
        if dtype == "float32":
            torch.testing.assert_close(logits, expected, atol=LOGITS, rtol=0)
        else:
            assert (logits - expected).std() < LOGITS_BFLOAT16 * expected.std()


def save_rounded(folder: Path, checkpoint: Path) -> None:
    """A checkpoint of the weights that int8 stands for."""
    shutil.copytree(checkpoint, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if re.search(r"language_model.*layers.*_proj\.weight|lm_head", name):
            weights, scales = to_int8(tensor)
            tensors[name] = weights * scales[:, None]
    save_file(tensors, file, {"format": "pt"})
