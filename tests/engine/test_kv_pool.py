"""The page pool: exact accounting after any history, no page owned twice, pages that really hold what was written."""

import random
from dataclasses import replace

import pytest

from tests.engine.fake_model import FakeModel
from trimserve.engine.kv_pool import KVPool, PoolExhausted, SequencePages

# 4 self- and 2 cross-attention layers: a page holds 2 layers, so 2 groups of one kind and 1 of the other.
INFO = replace(FakeModel().info, num_self_attention_layers=4, num_cross_attention_layers=2)
PAGE_BYTES = 16 * 2 * INFO.kv_bytes_per_position


def pool(num_pages: int) -> KVPool:
    return KVPool(INFO, num_pages * PAGE_BYTES + PAGE_BYTES - 1)


def owned(sequences: list[SequencePages]) -> list[int]:
    pages = [page for kv in sequences for page in kv.self_tables.ravel().tolist()]
    for kv in sequences:
        pages += [page for group in kv.held_cross_pages() for page in group]
    return pages


@pytest.mark.parametrize(("positions", "pages"), [(1, 2), (16, 2), (17, 4), (160, 20)])
def test_text_takes_whole_pages_in_each_group(positions: int, pages: int) -> None:
    some = pool(32)
    kv = some.allocate(positions)
    assert some.used_self_bytes == kv.self_bytes == some.self_bytes(positions) == pages * PAGE_BYTES
    assert some.num_free_pages == 32 - pages


@pytest.mark.parametrize(("rows", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_features_hold_whole_pages_and_give_back_the_others_once_their_number_is_known(rows: int, pages: int) -> None:
    some = pool(8)
    kv = some.allocate(1, 60)
    assert some.used_cross_bytes == kv.cross_bytes == 4 * PAGE_BYTES
    kv.keep_cross([rows, rows])
    assert some.used_cross_bytes == kv.cross_bytes == some.cross_bytes(rows) == pages * PAGE_BYTES


def test_more_than_is_free_is_refused_and_takes_nothing() -> None:
    some = pool(5)
    some.allocate(17)
    with pytest.raises(PoolExhausted, match="2 pages are wanted, 1 of 5 are free"):
        some.allocate(1)
    assert some.num_free_pages == 1
    with pytest.raises(PoolExhausted, match="6 pages are wanted, 5 of 5 are free"):
        pool(5).allocate(17, 17)


@pytest.mark.parametrize(("self_layers", "pages"), [(4, 3), (3, 3 + 1)])
def test_a_layer_that_holds_less_gives_back_the_pages_of_its_group(self_layers: int, pages: int) -> None:
    some = KVPool(replace(INFO, num_self_attention_layers=self_layers), 2**20)
    kv = some.allocate(1, 60)
    kv.keep_cross([40, 16])
    assert some.used_cross_bytes == kv.cross_bytes == pages * some.page_bytes
    kv.release()
    assert some.num_free_pages == some.num_pages


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
        living: list[SequencePages] = []
        for _ in range(rng.randint(1, 8)):
            action = rng.random()
            try:
                if action < 0.5:
                    living.append(some.allocate(rng.randint(1, 120), rng.randint(0, 200)))
                elif action < 0.8 and living:
                    kv = rng.choice(living)
                    most = 16 * len(kv.held_cross_pages()[0])
                    kv.keep_cross([rng.randint(0, most)] * 2)
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


def test_a_shared_page_counts_once_and_is_free_when_its_last_owner_gives_it_back() -> None:
    some = pool(40)
    first = some.allocate(36, 20)
    others = [first.share(36, 50) for _ in range(3)]
    for other in others:
        assert other.self_tables[:, :2].tolist() == first.self_tables[:, :2].tolist()
        assert other.held_cross_pages() == first.held_cross_pages()
        assert not {*other.self_tables[:, 2:].flat} & {*first.self_tables.flat}
    # 2 groups of text: 2 shared pages, and the last one of the first or 2 of each other; 1 group of features.
    assert some.used_self_bytes == 2 * (2 + 1 + 3 * 2) * PAGE_BYTES
    assert some.used_cross_bytes == 2 * PAGE_BYTES
    first.release()
    assert some.used_self_bytes == 2 * (2 + 3 * 2) * PAGE_BYTES
    for other in others:
        assert some.used_cross_bytes == 2 * PAGE_BYTES
        other.release()
    assert (some.num_free_pages, some.used_self_bytes, some.used_cross_bytes) == (40, 0, 0)


def test_a_text_grows_by_the_pages_that_it_lacks() -> None:
    some = pool(7)
    kv = some.allocate(16)
    before = kv.self_tables.tolist()
    assert (kv.missing_pages(16), kv.missing_pages(17)) == (0, 2)
    kv.grow(33)
    assert kv.self_tables.shape == (2, 3)
    assert kv.self_tables[:, :1].tolist() == before
    with pytest.raises(PoolExhausted, match="2 pages are wanted, 1 of 7 are free"):
        kv.grow(49)
    assert (some.num_free_pages, some.used_self_bytes) == (1, 6 * PAGE_BYTES)
