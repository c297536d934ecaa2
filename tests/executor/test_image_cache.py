"""The image cache: bytes, order of eviction, counters."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trimserve.executor.image_cache import ImageCache
from trimserve.trimming.encoded_image import EncodedImage, Observation

BASE = b""


def image(num_bytes: int, observation: Observation = "class_attention") -> EncodedImage:
    """An image of that many bytes, all of them observed."""
    return EncodedImage(torch.zeros(0, 1), 1, observed={observation: torch.zeros(num_bytes, dtype=torch.uint8)})


def with_layers(num_bytes: int, layer_bytes: int, num_layers: int = 2) -> EncodedImage:
    """An image that may keep keys and values of so many layers."""
    made = image(num_bytes)
    made.num_kv_layers, made.kv_layer_bytes = num_layers, layer_bytes
    return made


def filled(capacity: int, keys: str, layer_bytes: int = 10) -> ImageCache:
    """A cache with images of 20 bytes, each with the base model's keys and values as far as they fit."""
    cache = ImageCache(capacity)
    for key in keys:
        cache.put(key.encode(), with_layers(20, layer_bytes))
        cache.keep_keys_values(key.encode(), BASE)
    return cache


def state(cache: ImageCache, keys: str) -> list[int | None]:
    """Owners of keys and values of each image; None if the image is gone."""
    images = [cache.get(key.encode()) for key in keys]
    return [None if image is None else len(image.keys_values) for image in images]


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


def test_keys_and_values_are_kept_for_each_owner_while_there_is_room() -> None:
    cache = filled(100, "a")
    cache.keep_keys_values(b"a", b"adapter")
    assert (cache.used_bytes, cache.kv_bytes, cache.num_kv_hits) == (60, 40, 0)
    cache.keep_keys_values(b"a", BASE)
    assert cache.num_kv_hits == 1
    cache.drop_keys_values(b"adapter")
    assert (cache.used_bytes, cache.kv_bytes, cache.num_evictions) == (40, 20, 0)
    cache.keep_keys_values(b"unknown", BASE)
    assert cache.kv_bytes == 20


def test_keys_and_values_beyond_a_quarter_make_room_for_features_and_those_used_longest_ago_go_first() -> None:
    cache = filled(100, "ab")
    cache.keep_keys_values(b"a", BASE)
    cache.put(b"c", image(30))
    assert (cache.used_bytes, cache.num_evictions) == (90, 0)
    assert state(cache, "abc") == [1, 0, 0]


def test_up_to_a_quarter_keys_and_values_make_room_at_the_expense_of_images() -> None:
    cache = filled(100, "abcde")
    assert state(cache, "abcde") == [None, 0, 0, 0, 1]
    assert (cache.used_bytes, cache.kv_bytes, cache.num_evictions) == (100, 20, 1)


def test_as_many_layers_are_kept_as_there_is_room_for() -> None:
    for layer_bytes, num_layers in ((30, 2), (50, 1), (81, 0)):
        cache = filled(100, "a", layer_bytes)
        assert (cache.kv_bytes, cache.used_bytes) == (num_layers * layer_bytes, 20 + num_layers * layer_bytes)


def test_an_image_that_is_encoded_again_keeps_its_keys_and_values() -> None:
    cache = filled(100, "a")
    cache.put(b"a", with_layers(20, 10))
    assert state(cache, "a") == [1]
    assert (cache.used_bytes, cache.kv_bytes) == (40, 20)


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "keep"]), st.integers(0, 9), st.integers(0, 60)), max_size=60))
def test_bytes_are_those_of_what_is_kept_and_never_more_than_the_capacity(
    history: list[tuple[str, int, int]],
) -> None:
    cache = ImageCache(100)
    sizes: dict[bytes, int] = {}
    for action, number, size in history:
        key = bytes([number])
        if action == "put":
            sizes.setdefault(key, size)
            cache.put(key, with_layers(sizes[key], 1 + number))
        elif action == "get":
            cache.get(key)
        elif cache.get(key) is not None:
            cache.keep_keys_values(key, bytes([size % 3]))
        assert cache.used_bytes <= 100
    kept = {key: image for key in sizes if (image := cache.get(key)) is not None}
    assert cache.used_bytes - cache.kv_bytes == sum(sizes[key] for key in kept)
    num_sets = {key[0]: len(image.keys_values) for key, image in kept.items()}
    assert sum(num * (1 + key) for key, num in num_sets.items()) <= cache.kv_bytes
    assert cache.kv_bytes <= sum(num * 2 * (1 + key) for key, num in num_sets.items())
