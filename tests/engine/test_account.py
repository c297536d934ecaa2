"""What a request holds in the pool, and the account of it that its client gets."""

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.engine.fake_model import IMAGE, FakeModel, request
from tests.engine.stepping import alone, finished, make_engine
from trimserve.api.chunks import GenerationChunk, ImageUsage, Started
from trimserve.api.prompt import ImageFile, TokenPrompt
from trimserve.api.trim import TrimRequest
from trimserve.engine.account import account_cross_kv
from trimserve.engine.kv_pool import KVPool
from trimserve.errors import TrimserveError
from trimserve.executor.plan import PrefillReport, PrefillTimes
from trimserve.ops import PAGE_POSITIONS


def prefilled(
    num_padding: tuple[int, ...],
    num_valid: tuple[int, ...],
    num_kept: tuple[int, ...],
    layer_rows: tuple[tuple[int, ...], ...] = (),
) -> PrefillReport:
    """A report with these counts."""
    return PrefillReport(
        sequence=0,
        num_padding=num_padding,
        num_valid=num_valid,
        num_kept=num_kept,
        num_merged=(),
        layer_rows=layer_rows,
        held_rows=(),
        selections=(),
        stored=None,
        times=PrefillTimes(0.0, 0.0, 0.0),
        trim_times=(),
    )


def test_kv_is_held_in_whole_pages_while_running_and_released_before_the_last_chunk() -> None:
    engine = make_engine(FakeModel(), max_batch=1)
    held: list[tuple[int, int]] = []
    prompt = TokenPrompt((IMAGE, 65, IMAGE, 66), (ImageFile(b"4"), ImageFile(b"4")))

    def note(_: GenerationChunk | TrimserveError) -> None:
        held.append((engine.pool.used_self_bytes, engine.pool.used_cross_bytes))

    engine.add(engine.prepare(request(prompt, max_new_tokens=14), note, 0.0))
    while engine.has_work:
        engine.step()
    # 4 + 14 positions: 2 pages in 2 layers; 10 of the last image's 20 features are kept: 1 page in 3 layers.
    assert set(held[:-1]) == {(2 * PAGE_POSITIONS * 2 * 8, PAGE_POSITIONS * 3 * 8)}
    assert held[-1] == (0, 0)


def test_usage_names_padding_valid_and_kept_features_of_each_image() -> None:
    output = alone(FakeModel(), request(TokenPrompt((IMAGE, IMAGE, 66), (ImageFile(b"1"), ImageFile(b"3")))))
    assert isinstance(output[0], Started)
    assert output[0].images == (ImageUsage(15, 5, 3), ImageUsage(5, 15, 8))
    page = PAGE_POSITIONS * 3 * 8
    account = finished(output).cross_kv
    # 40 padded, 20 valid, 11 kept, 8 held features: 3, 2, 1 and 1 pages.
    assert (account.untrimmed, account.held) == (2 * page, page)
    assert (account.saved_by_padding, account.saved_by_trimming, account.saved_by_visibility) == (
        page,
        page,
        0,
    )


def test_merged_rows_are_held_and_counted_apart_from_kept_features() -> None:
    asked = request(TokenPrompt((IMAGE, IMAGE, 66), (ImageFile(b"1"), ImageFile(b"4"))))
    output = alone(FakeModel(), replace(asked, trim=TrimRequest(k_ratio=0.5, merge_ratio=0.7)))
    assert isinstance(output[0], Started)
    assert output[0].images == (ImageUsage(15, 5, 3, 2), ImageUsage(0, 20, 10, 7))
    page = PAGE_POSITIONS * 3 * 8
    account = finished(output).cross_kv
    # 40 padded, 25 valid, 13 kept and 9 merged, 17 held rows: 3, 2, 2 and 2 pages.
    assert (account.untrimmed, account.held, account.saved_by_trimming) == (2 * page, 2 * page, 0)


def test_layers_that_hold_less_are_accounted_by_their_own_pages() -> None:
    pool = KVPool(FakeModel().info, 2**20)  # a page holds one of the three layers
    kv = pool.allocate(1, 60)
    kv.keep_cross([33, 17, 0])
    report = prefilled((0, 15), (20, 60), (16, 33), layer_rows=((16, 33), (8, 17), (0, 0)))
    account = account_cross_kv(report, kv.cross_bytes, pool)
    page = PAGE_POSITIONS * 8
    # 80 valid in each layer: 5 pages. Kept 49, 25 and 0: 4, 2 and 0. Held 33, 17 and 0: 3, 2 and 0.
    assert (account.untrimmed, account.held) == (15 * page, 5 * page)
    assert (account.saved_by_padding, account.saved_by_trimming, account.saved_by_visibility) == (
        3 * page,
        9 * page,
        page,
    )
    assert pool.used_cross_bytes == kv.cross_bytes == account.held


@given(
    st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 4000), st.floats(0.0, 1.0)), max_size=4),
    st.data(),
)
def test_bytes_add_up_to_the_padded_cache(images: list[tuple[int, int, float]], data: st.DataObject) -> None:
    num_kept = tuple(max(1, math.floor(valid * fraction)) for _, valid, fraction in images)
    num_held = data.draw(st.integers(0, sum(num_kept)))
    pool = KVPool(FakeModel().info, 2**20)
    kv = pool.allocate(1, num_held)
    report = prefilled(tuple(padding for padding, _, _ in images), tuple(valid for _, valid, _ in images), num_kept)
    account = account_cross_kv(report, kv.cross_bytes, pool)
    saved = (account.saved_by_padding, account.saved_by_trimming, account.saved_by_visibility)
    assert pool.cross_bytes(sum(padding + valid for padding, valid, _ in images)) == account.held + sum(saved)
    assert min(saved) >= 0
    assert account.held == pool.used_cross_bytes
