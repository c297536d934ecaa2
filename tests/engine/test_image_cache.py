"""The image cache: bytes, order of eviction, counters."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trimserve.engine.image_cache import ImageCache


def features(num_bytes: int) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


def test_what_was_used_longest_ago_goes_first() -> None:
    cache = ImageCache(100)
    for key in (b"a", b"b"):
        cache.put(key, features(50))
    assert cache.get(b"a") is not None
    cache.put(b"c", features(40))
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    assert cache.get(b"c") is not None
    assert cache.num_evictions == 1
    assert cache.used_bytes == 90
    assert (cache.num_hits, cache.num_misses) == (3, 1)


def test_what_is_larger_than_the_cache_is_not_kept_and_evicts_nothing() -> None:
    cache = ImageCache(100)
    cache.put(b"a", features(60))
    cache.put(b"huge", features(101))
    assert cache.get(b"a") is not None
    assert cache.get(b"huge") is None


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = ImageCache(0)
    cache.put(b"a", features(1))
    assert cache.get(b"a") is None
    assert cache.used_bytes == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 60)), max_size=60))
def test_bytes_are_those_of_what_is_kept_and_never_more_than_the_capacity(
    history: list[tuple[bool, int, int]],
) -> None:
    cache = ImageCache(100)
    sizes: dict[bytes, int] = {}
    for is_put, number, size in history:
        key = bytes([number])
        if is_put:
            sizes.setdefault(key, size)
            cache.put(key, features(sizes[key]))
        else:
            cache.get(key)
        assert cache.used_bytes <= 100
    kept = [key for key in sizes if cache.get(key) is not None]
    assert cache.used_bytes == sum(sizes[key] for key in kept)
