"""A decode step with several new rows of a sequence gives what as many steps of one row give."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.model.conftest import NO_TRIM, Pair
from tests.model.random_checkpoint import Geometry
from tests.model.test_mllama import ONE, TWO_APART, noise, raw
from trimserve.api.trim import FixedCount, TrimRequest
from trimserve.evaluation.pages import OwnKeyValues, OwnPages
from trimserve.model.bucketed_decode import Step
from trimserve.model.interruptible import run_through
from trimserve.trimming.plan import TrimPlan

SEVERAL = 1e-5
"""Float32 logits: the same sums, taken over other batches of rows."""

TOKENS = [[5, 17, 9], [3], [8, 8, 21, 4, 30], [11], [6, 7]]
"""New tokens of each sequence."""

CASCADE = TrimPlan.of(
    TrimRequest(policy="sparsevlm", budget=FixedCount(12), merge_ratio=0.2, parameters={"cascade_ratio": 0.5})
)


@pytest.fixture(scope="module")
def deep(make_pair: Callable[..., Pair]) -> Pair:
    """Three cross-attention layers."""
    return make_pair(Geometry(num_layers=6, cross_layers=(0, 2, 5)))


def prefilled(pair: Pair, pool: OwnPages) -> list[OwnKeyValues]:
    """Text alone, and images that are kept whole, merged, seen in part and seen less from layer to layer."""
    tile = pair.ours.info.tile_size
    kvs = []
    for text, images, trim in [
        ("just words", [], NO_TRIM),
        (ONE, [noise((1, 2), tile, 1)], NO_TRIM),
        ("before " + ONE, [noise((2, 2), tile, 2)], TrimPlan.of(TrimRequest(k_ratio=0.1, merge_ratio=0.1))),
        ("a few more words", [], NO_TRIM),
        (TWO_APART, [noise((1, 1), tile, 3), noise((2, 2), tile, 4)], CASCADE),
    ]:
        prompt = pair.ours.prepare(raw(text, images))
        kv = pair.granted(prompt, 20, pool)
        run_through(pair.ours.prefill(prompt, pair.encoded(prompt, trim), trim, kv))
        kvs.append(kv)
    return kvs


def one_by_one(pair: Pair, kvs: list[OwnKeyValues]) -> Tensor:
    return torch.cat(
        [pair.ours.decode([token], [kv]) for kv, tokens in zip(kvs, TOKENS, strict=True) for token in tokens]
    )


def at_once(pair: Pair, kvs: list[OwnKeyValues]) -> Tensor:
    tokens = [token for of_sequence in TOKENS for token in of_sequence]
    return pair.ours.decode(tokens, kvs, [len(of_sequence) for of_sequence in TOKENS]).clone()


@pytest.mark.parametrize("way", ["compiled", "layer by layer", "in buffers"])
def test_several_rows_in_one_step_equal_as_many_steps_of_one_row(
    deep: Pair, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    expected = one_by_one(deep, prefilled(deep, deep.pool))
    pool = deep.pool
    kvs = prefilled(deep, pool)
    lengths = [kv.length for kv in kvs]
    steps: list[Step] = []
    if way != "compiled":
        monkeypatch.setattr(deep.ours._decoder, "_compiled", None)
    if way == "in buffers":
        monkeypatch.setattr(deep.ours, "_bucketed", None)

        def capture(step: Step) -> Step:
            steps.append(step)
            return step

        deep.ours.warm_up_decode(pool.pages, 12, capture)
    for _ in range(2):  # the second time the tables are known
        for kv, length in zip(kvs, lengths, strict=True):
            kv.length = length
        torch.testing.assert_close(at_once(deep, kvs), expected, atol=SEVERAL, rtol=0)
    assert [kv.length for kv in kvs] == [length + len(tokens) for length, tokens in zip(lengths, TOKENS, strict=True)]
    assert bool(steps) == (way == "in buffers")
    # What was stored serves the steps that follow.
    alone = prefilled(deep, deep.pool)
    one_by_one(deep, alone)
    follow = deep.ours.decode([1, 2, 3, 4, 5], kvs)
    torch.testing.assert_close(follow, deep.ours.decode([1, 2, 3, 4, 5], alone), atol=SEVERAL, rtol=0)


def test_tables_that_grow_are_looked_up_anew(pair: Pair) -> None:
    prompt = pair.ours.prepare(raw("x" * 13, []))
    pool = pair.pool
    whole, growing = (pair.granted(prompt, 30, pool) for _ in range(2))
    for kv in (whole, growing):
        run_through(pair.ours.prefill(prompt, [], NO_TRIM, kv))
    tables = growing.self_tables
    growing.self_tables = tables[:, :1]
    for step in range(16 - growing.length):
        torch.testing.assert_close(*(pair.ours.decode([step + 3], [kv]) for kv in (whole, growing)), atol=0, rtol=0)
    growing.replace_tables(tables, growing.cross_tables)
    torch.testing.assert_close(*(pair.ours.decode([7], [kv]) for kv in (whole, growing)), atol=0, rtol=0)


def test_pages_for_fewer_rows_than_an_image_holds_are_refused(pair: Pair) -> None:
    prompt = pair.ours.prepare(raw(ONE, [noise((2, 2), pair.ours.info.tile_size)]))
    kv = pair.pool.key_values(len(prompt.token_ids), 16)
    with pytest.raises(ValueError, match="cross_tables: must have room for 40 rows, got pages for 16"):
        run_through(pair.ours.prefill(prompt, pair.encoded(prompt), NO_TRIM, kv))
