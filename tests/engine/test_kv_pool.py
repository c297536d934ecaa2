"""The page pool: exact accounting after any history, no page owned twice, pages that really hold what was written."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.engine.fake_model import FakeModel
from trimserve.engine.kv_pool import KVPool, PoolExhausted, SequenceKV
from trimserve.model.decode_batch import DecodeBatch
from trimserve.model.decode_rows import NewRows
from trimserve.model.key_values import FeatureTables, write_rows

# 4 self- and 2 cross-attention layers: a page holds 2 layers, so 2 groups of one kind and 1 of the other.
INFO = replace(FakeModel().info, num_self_attention_layers=4, num_cross_attention_layers=2)
PAGE_BYTES = 16 * 2 * INFO.kv_bytes_per_position


def pool(num_pages: int) -> KVPool:
    return KVPool(INFO, num_pages * PAGE_BYTES + PAGE_BYTES - 1)


def owned(sequences: list[SequenceKV]) -> list[int]:
    pages = [page for kv in sequences for page in kv.self_tables.ravel().tolist()]
    for kv in sequences:
        pages += kv._cross_pages()
    return pages


@pytest.mark.parametrize(("positions", "pages"), [(1, 2), (16, 2), (17, 4), (160, 20)])
def test_text_takes_whole_pages_in_each_group(positions: int, pages: int) -> None:
    some = pool(32)
    kv = some.allocate(positions)
    assert some.used_self_bytes == kv.self_bytes == some.self_bytes(positions) == pages * PAGE_BYTES
    assert some.num_free_pages == 32 - pages


@pytest.mark.parametrize(("rows", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_features_take_whole_pages(rows: int, pages: int) -> None:
    some = pool(8)
    kv = some.allocate(1, rows)
    assert some.used_cross_bytes == kv.cross_bytes == some.cross_bytes(rows) == pages * PAGE_BYTES


def test_more_than_is_free_is_refused_and_takes_nothing() -> None:
    some = pool(5)
    kv = some.allocate(17)
    with pytest.raises(PoolExhausted, match="2 pages are wanted, 1 of 5 are free"):
        some.allocate(1)
    assert some.num_free_pages == 1
    kv.release()
    with pytest.raises(PoolExhausted, match="6 pages are wanted, 5 of 5 are free"):
        some.allocate(17, 17)
    assert some.num_free_pages == 5
    some.allocate(17, 16)
    assert some.num_free_pages == 0


@pytest.mark.parametrize(("layers", "pages"), [(None, 3), (2, 3), (1, 3 + 1)])
def test_a_layer_that_holds_less_gives_back_the_pages_of_its_group(layers: int | None, pages: int) -> None:
    some = KVPool(INFO, 2**20, layers)
    kv = some.allocate(1, 60)
    kv.cross_lengths = [40, 16]
    kv.give_back_unused()
    assert some.used_cross_bytes == kv.cross_bytes == pages * some.page_bytes
    kv.release()
    assert some.num_free_pages == some.num_pages


def test_layers_of_a_page_divide_those_of_either_kind() -> None:
    with pytest.raises(ValueError, match=r"must divide 2, .* of 4 self- and 2 cross-attention layers .* got 4"):
        KVPool(INFO, 2**20, 4)


def test_a_second_release_does_nothing() -> None:
    some = pool(8)
    kv = some.allocate(16)
    other = some.allocate(16)
    kv.release()
    kv.release()
    assert some.num_free_pages == 6
    other.release()
    assert (some.num_free_pages, some.used_self_bytes, some.used_cross_bytes) == (8, 0, 0)


def test_accounting_is_exact_after_ten_thousand_random_histories() -> None:
    rng = random.Random(0)
    some = pool(40)
    for _ in range(10_000):
        living: list[SequenceKV] = []
        for _ in range(rng.randint(1, 8)):
            action = rng.random()
            try:
                if action < 0.5:
                    living.append(some.allocate(rng.randint(1, 120), rng.choice([0, rng.randint(1, 200)])))
                elif action < 0.8 and living:
                    kv = rng.choice(living)
                    granted = 16 * kv._cross_counts[0]
                    if not kv.cross_length:  # as after a prefill, once
                        kv.cross_lengths = [rng.randint(0, granted)] * 2
                        kv.give_back_unused()
                elif living:
                    living.pop(rng.randrange(len(living))).release()
            except PoolExhausted:
                pass
            pages = owned(living)
            assert len(pages) == len(set(pages)) == some.num_pages - some.num_free_pages
            assert some.used_self_bytes + some.used_cross_bytes == len(pages) * PAGE_BYTES
        for kv in living:
            kv.release()
        assert some.num_free_pages == some.num_pages


def test_rows_come_back_from_the_pages_that_they_were_written_to() -> None:
    info = replace(INFO, num_kv_heads=2, head_dim=3, num_heads=2)
    some = KVPool(info, 64 * 16 * 2 * 2 * 2 * 3 * 4)
    torch.manual_seed(0)
    kvs = [some.allocate(40), some.allocate(20)]
    written = []
    for kv, rows in zip(kvs, (33, 7), strict=True):
        keys, values = torch.randn(4, rows, 2, 3), torch.randn(4, rows, 2, 3)
        for layer in range(4):
            write_rows(kv.pages, kv.self_tables, layer, keys[layer], values[layer])
        kv.length = rows - 1  # the last row is taken for the new one
        written.append((keys, values))
    new = NewRows.of(kvs)
    tables = DecodeBatch(new).text(some.pages, [*new.positions])
    for layer in range(4):
        queries = torch.randn(2, 2, 3)
        attended = tables.attend(layer, queries, 0.5)
        for row, (keys, values) in enumerate(written):
            weights = torch.einsum("hd,nhd->hn", queries[row], keys[layer]).mul(0.5).softmax(-1)
            assert torch.allclose(attended[row], torch.einsum("hn,nhd->hd", weights, values[layer]), atol=1e-6)


def test_a_bias_reaches_the_rows_of_its_sequence_only() -> None:
    info = replace(INFO, num_kv_heads=1, head_dim=2, num_heads=1)
    some = KVPool(info, 64 * 16 * 2 * 2 * 2 * 4)
    kvs = [some.allocate(1, 3) for _ in range(2)]
    for kv, bias in zip(kvs, (None, np.array([0.0, 0.0, np.log(6.0)], dtype=np.float32)), strict=True):
        kv.hold_features(0, 3, bias)
        kv.hold_features(1, 3, bias)
        values = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 2.0]]])
        write_rows(kv.pages, kv.cross_tables, 0, torch.zeros(3, 1, 2), values)
    attended = FeatureTables.of(kvs).attend(some.pages, 0, torch.ones(2, 1, 2), 1.0)
    # Equal logits: weights of one third each; 1, 1 and 6 parts of eight with the bias.
    assert torch.allclose(attended[:, 0], torch.tensor([[1 / 3, 1.0], [1 / 8, 13 / 8]]))
