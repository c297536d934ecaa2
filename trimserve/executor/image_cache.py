"""Images seen before: another question on the same image skips the vision encoder, and most products of its features.

Beside its features an image keeps what policies chose from it alone (`trimming/encoded_image.py`), and its keys and
values in the cross-attention layers (`trimming/feature_kv.py`), of the base model and of each adapter that changes
them. Keyed by what the encoder sees (`PreparedImage.key`), so the same picture in another file format is another image
only if its pixels differ; and by the adapter, where that changes the features. Shared by requests and bounded in bytes;
it never counts as trimming.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from trimserve.executor.plan import ImageCacheCounts
from trimserve.trimming.encoded_image import EncodedImage, Observation
from trimserve.trimming.feature_kv import FeatureKeyValues

__all__ = ["ImageCache"]

_KV_SHARE: Final = 4
"""Keys and values take the place of features up to this part of the capacity: features are far dearer to make."""


class ImageCache:
    """Least recently used first out. Belongs to the executor."""

    def __init__(self, capacity_bytes: int) -> None:
        """Start empty.

        Args:
            capacity_bytes: of all images together, at least 0; 0 keeps nothing.
        """
        self.capacity_bytes = capacity_bytes
        """Most bytes it holds."""
        self.num_hits = 0
        """Images found."""
        self.num_misses = 0
        """Images that had to be encoded."""
        self.num_evictions = 0
        """Images that made room for others."""
        self.num_kv_hits = 0
        """Images whose keys and values were found."""
        self.kv_bytes = 0
        """Bytes set aside for keys and values."""
        self._feature_bytes = 0
        self._images: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._kv: OrderedDict[tuple[bytes, bytes], int] = OrderedDict()
        """Bytes of keys and values, by image and `Adapter.kv_key`."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the images that it holds, keys and values included."""
        return self._feature_bytes + self.kv_bytes

    @property
    def counts(self) -> ImageCacheCounts:
        """All of the above."""
        return ImageCacheCounts(
            num_bytes=self.used_bytes,
            num_hits=self.num_hits,
            num_misses=self.num_misses,
            num_evictions=self.num_evictions,
            num_kv_bytes=self.kv_bytes,
            num_kv_hits=self.num_kv_hits,
        )

    def get(self, key: bytes, needs: frozenset[Observation] = frozenset()) -> EncodedImage | None:
        """An image of which all that is needed is known, or None."""
        if not self.has(key, needs):
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._images.move_to_end(key)
        return self._images[key]

    def has(self, key: bytes, needs: frozenset[Observation] = frozenset()) -> bool:
        """Whether `get` would find the image; counts as no use."""
        image = self._images.get(key)
        return image is not None and image.has(needs)

    def drop(self, is_unwanted: Callable[[bytes], bool]) -> None:
        """Let go of the images with such keys."""
        for key in [key for key in self._images if is_unwanted(key)]:
            self._drop_image(key)

    def drop_keys_values(self, owner: bytes) -> None:
        """Let go of the keys and values of an adapter, by its `kv_key`."""
        for place in [place for place in self._kv if place[1] == owner]:
            self._drop_keys_values(place)

    def put(self, key: bytes, image: EncodedImage) -> None:
        """Keep an image, at the expense of what was not used for the longest time.

        What was observed of it before stays known, as do its keys and values. An image larger than the whole cache is
        not kept.
        """
        before = self._images.pop(key, None)
        if before is not None:
            self._feature_bytes -= before.nbytes
            image.observed = before.observed | image.observed
            image.keys_values = before.keys_values
        self._images[key] = image
        self._feature_bytes += image.nbytes
        if image.nbytes > self.capacity_bytes:
            self._drop_image(key)
        while self.used_bytes > self.capacity_bytes:
            if self.kv_bytes > self.capacity_bytes // _KV_SHARE or len(self._images) == 1:
                self._drop_keys_values(next(iter(self._kv)))
            else:
                self._evict()

    def keep_keys_values(self, key: bytes, owner: bytes) -> None:
        """Set bytes aside for the keys and values of an image, if it is here: for as many layers as there is room for.

        Args:
            key: of the image that was used last.
            owner: `Adapter.kv_key`; empty for the base model.
        """
        image = self._images.get(key)
        if image is None:
            return
        if owner in image.keys_values:
            self.num_kv_hits += 1
            self._kv.move_to_end((key, owner))
            return
        room = max(self.capacity_bytes - self._feature_bytes, self.capacity_bytes // _KV_SHARE)
        room = min(room, self.capacity_bytes - image.nbytes)
        num_layers = min(image.num_kv_layers, room // max(1, image.kv_layer_bytes))
        if num_layers:
            num_bytes = num_layers * image.kv_layer_bytes
            while self.kv_bytes + num_bytes > room:
                self._drop_keys_values(next(iter(self._kv)))
            image.keys_values[owner] = FeatureKeyValues(image.num_features, num_layers)
            self._kv[key, owner] = num_bytes
            self.kv_bytes += num_bytes
            while self.used_bytes > self.capacity_bytes:
                self._evict()

    def _evict(self) -> None:
        self._drop_image(next(iter(self._images)))
        self.num_evictions += 1

    def _drop_image(self, key: bytes) -> None:
        for place in [place for place in self._kv if place[0] == key]:
            self._drop_keys_values(place)
        self._feature_bytes -= self._images.pop(key).nbytes

    def _drop_keys_values(self, place: tuple[bytes, bytes]) -> None:
        self.kv_bytes -= self._kv.pop(place)
        key, owner = place
        del self._images[key].keys_values[owner]
