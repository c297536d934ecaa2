"""A decode step's layers as one op: what they give layer by layer, for any mixture of sequences."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.model.conftest import NO_TRIM, Pair
from tests.model.random_checkpoint import Geometry, draw_geometry
from tests.model.test_mllama import noise, raw
from tests.tolerances import LOGITS, LOGITS_BFLOAT16
from trimserve.api.trim import TrimRequest
from trimserve.evaluation.pages import OwnKeyValues, OwnPages
from trimserve.model.compiled_decode import CompiledDecode
from trimserve.trimming.plan import TrimPlan

TRIM = TrimPlan.of(TrimRequest(k_ratio=0.2, merge_ratio=0.1))


def prefilled(pair: Pair, pool: OwnPages, seed: int = 0) -> list[OwnKeyValues]:
    """Text, a trimmed image and an untrimmed one, text again."""
    image = noise((1, 2), pair.ours.info.tile_size, seed)
    kvs = []
    for text, images, trim in [
        ("Tell me", [], NO_TRIM),
        ("<|image|>What is this?", [image], TRIM),
        ("<|image|>And what is that?", [image], NO_TRIM),
        ("Tell me more", [], NO_TRIM),
    ]:
        prepared = pair.ours.prepare(raw(text, images))
        kv = pair.granted(prepared, 4, pool)
        rows = pair.ours.prompt_rows(prepared, pair.encoded(prepared, trim), trim, kv)
        pair.ours.logits([rows], prepared.token_ids)
        kvs.append(kv)
    return kvs


def decoded(pair: Pair, kvs: list[OwnKeyValues]) -> Tensor:
    """Logits of two steps, sequence after sequence."""
    return torch.stack([pair.ours.decode([3 + step, 5, 7, 9], kvs) for step in range(2)])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("dtype", "quantize", "tolerance"),
    [
        ("float32", "none", LOGITS),
        ("float32", "int8", LOGITS),
        ("float32", "int4", LOGITS),
        ("bfloat16", "none", LOGITS_BFLOAT16),
    ],
)
def test_equals_layer_by_layer(
    make_pair: Callable[..., Pair],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    dtype: str,
    quantize: str,
    tolerance: float,
) -> None:
    geometry = draw_geometry(seed)
    if quantize == "int4":  # whose inputs come in units of 32
        geometry = replace(geometry, num_kv_heads=2, heads_per_kv=2, head_dim=8)
    pair = make_pair(geometry, seed, dtype=dtype, quantize=quantize)
    pool = pair.pool
    together = decoded(pair, prefilled(pair, pool))
    monkeypatch.setattr(CompiledDecode, "__call__", lambda *_: pytest.fail("layer by layer was asked for"))
    monkeypatch.setattr(pair.ours._decoder, "_compiled", None)
    apart = decoded(pair, prefilled(pair, pool))
    torch.testing.assert_close(together, apart, atol=2 * tolerance, rtol=0)  # each is off by as much


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_is_used_on_a_cpu(make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, quantize: str) -> None:
    pair = make_pair(Geometry(), quantize=quantize)
    monkeypatch.setattr(CompiledDecode, "__call__", lambda *_: (_ for _ in ()).throw(AssertionError("used")))
    with pytest.raises(AssertionError, match="used"):
        decoded(pair, prefilled(pair, pair.pool))


def test_int4_weights_of_no_whole_units_are_decoded_layer_by_layer(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(Geometry(head_dim=10), quantize="int4")
    assert pair.ours._decoder._compiled is None
    assert decoded(pair, prefilled(pair, pair.pool)).isfinite().all()


def test_norms_that_differ_are_decoded_layer_by_layer(make_pair: Callable[..., Pair]) -> None:
    layers = make_pair(Geometry()).ours._decoder._layers
    assert CompiledDecode.of(layers) is not None
    layers[1]._mlp_norm.epsilon *= 2
    assert CompiledDecode.of(layers) is None


def test_nothing_is_kept_of_sequences_that_ended(pair: Pair) -> None:
    pool = OwnPages(pair.ours.info, 2**22)
    kvs = prefilled(pair, pool)
    decoded(pair, kvs)
    pages = weakref.ref(pool.pages)
    del kvs, pool
    gc.collect()
    assert pages() is None


def test_a_batch_whose_members_change_is_looked_up_anew(pair: Pair) -> None:
    pool = pair.pool
    kvs, others = prefilled(pair, pool), prefilled(pair, pool, seed=1)
    alone = decoded(pair, prefilled(pair, pool, seed=1))
    decoded(pair, kvs)
    mixed = [kvs[0], others[1], others[2], kvs[3]]
    pair.ours.decode([1, 1, 1, 1], [kvs[0], kvs[1], kvs[2], kvs[3]])
    torch.testing.assert_close(decoded(pair, mixed)[:, 1:3], alone[:, 1:3], atol=LOGITS, rtol=0)


def test_angles_are_known_wherever_the_table_has_to_grow(pair: Pair) -> None:
    angles = pair.ours._decoder._angles
    grown = type(angles)(angles._rotary)
    for position in (0, 255, 256, 257, 1023):
        cosines, _ = grown.at([position])
        expected = (position * angles._rotary.frequencies).cos()
        torch.testing.assert_close(cosines[0], expected, atol=1e-4, rtol=0)
    assert grown.at([])[0].shape[0] == 0


def test_the_same_sequences_in_another_order_are_looked_up_anew(pair: Pair) -> None:
    pool = pair.pool
    a, b, *_ = prefilled(pair, pool)
    alone = [pair.ours.decode([token], [kv])[0] for kv, token in zip(prefilled(pair, pool), [3, 5], strict=False)]
    lengths = a.length, b.length
    for order in [(a, b), (b, a)]:
        a.length, b.length = lengths
        together = pair.ours.decode([3 if kv is a else 5 for kv in order], order)
        expected = torch.stack([alone[0 if kv is a else 1] for kv in order])
        torch.testing.assert_close(together, expected, atol=LOGITS, rtol=0)
