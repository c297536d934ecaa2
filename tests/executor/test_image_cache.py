"""The image cache: bytes, order of eviction, counters."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trimserve.executor.image_cache import ImageCache
from trimserve.trimming.encoded_image import EncodedImage, Observation


def image(num_bytes: int, observation: Observation = "class_attention") -> EncodedImage:
    """An image of that many bytes, all of them observed."""
    return EncodedImage(torch.zeros(0, 1), 1, observed={observation: torch.zeros(num_bytes, dtype=torch.uint8)})


def test_what_was_used_longest_ago_goes_first() -> None:
    cache = ImageCache(100)
    for key in (b"a", b"b"):
        cache.put(key, image(50))
    assert cache.get(b"a") is not None
    cache.put(b"c", image(40))
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    assert cache.get(b"c") is not None
    assert cache.num_evictions == 1
    assert cache.used_bytes == 90
    assert (cache.num_hits, cache.num_misses) == (3, 1)


def test_what_is_larger_than_the_cache_is_not_kept_and_evicts_nothing() -> None:
    cache = ImageCache(100)
    cache.put(b"a", image(60))
    cache.put(b"huge", image(101))
    assert cache.get(b"a") is not None
    assert cache.get(b"huge") is None


def test_unwanted_images_give_their_bytes_back_and_are_no_evictions() -> None:
    cache = ImageCache(100)
    for key in (b"a1", b"a2", b"b1"):
        cache.put(key, image(30))
    cache.drop(lambda key: key.startswith(b"a"))
    assert (cache.used_bytes, cache.num_evictions) == (30, 0)
    assert cache.get(b"a1") is None
    assert cache.get(b"b1") is not None


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = ImageCache(0)
    cache.put(b"a", image(1))
    assert cache.get(b"a") is None
    assert cache.used_bytes == 0


def test_an_image_of_which_too_little_is_known_is_a_miss_and_then_more_is_known() -> None:
    cache = ImageCache(100)
    cache.put(b"a", image(30))
    assert cache.get(b"a", frozenset({"vision_attention"})) is None
    cache.put(b"a", image(50, "vision_attention"))
    assert cache.get(b"a", frozenset({"class_attention", "vision_attention"})) is not None
    assert cache.used_bytes == 80
    assert (cache.num_hits, cache.num_misses) == (1, 1)


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
            cache.put(key, image(sizes[key]))
        else:
            cache.get(key)
        assert cache.used_bytes <= 100
    kept = [key for key in sizes if cache.get(key) is not None]
    assert cache.used_bytes == sum(sizes[key] for key in kept)
