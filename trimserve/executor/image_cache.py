"""Images seen before: another question on the same image skips the vision encoder.

Beside its features an image keeps what policies chose from it alone (`trimming/encoded_image.py`). Keyed by what the
encoder sees (`PreparedImage.key`), so the same picture in another file format is another image only if its pixels
differ; and by the adapter, where that changes the features. Shared by requests and bounded in bytes; it never counts as
trimming.
"""

from collections import OrderedDict
from collections.abc import Callable

from trimserve.trimming.encoded_image import EncodedImage, Observation

__all__ = ["ImageCache"]


class ImageCache:
    """Least recently used first out. Belongs to the executor."""

    def __init__(self, capacity_bytes: int) -> None:
        """Start empty.

        Args:
            capacity_bytes: of all images together, at least 0; 0 keeps nothing.
        """
        self.capacity_bytes = capacity_bytes
        """Most bytes it holds."""
        self.used_bytes = 0
        """Bytes of the images that it holds."""
        self.num_hits = 0
        """Images found."""
        self.num_misses = 0
        """Images that had to be encoded."""
        self.num_evictions = 0
        """Images that made room for others."""
        self._images: OrderedDict[bytes, EncodedImage] = OrderedDict()

    def get(self, key: bytes, needs: frozenset[Observation] = frozenset()) -> EncodedImage | None:
        """An image of which all that is needed is known, or None."""
        image = self._images.get(key)
        if image is None or not image.has(needs):
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._images.move_to_end(key)
        return image

    def drop(self, is_unwanted: Callable[[bytes], bool]) -> None:
        """Let go of the images with such keys."""
        for key in [key for key in self._images if is_unwanted(key)]:
            self.used_bytes -= self._images.pop(key).nbytes

    def put(self, key: bytes, image: EncodedImage) -> None:
        """Keep an image, at the expense of those not used for the longest time.

        What was observed of it before stays known. An image larger than the whole cache is not kept.
        """
        before = self._images.pop(key, None)
        if before is not None:
            self.used_bytes -= before.nbytes
            image.observed = before.observed | image.observed
        if image.nbytes > self.capacity_bytes:
            return
        while self.used_bytes + image.nbytes > self.capacity_bytes:
            _, oldest = self._images.popitem(last=False)
            self.used_bytes -= oldest.nbytes
            self.num_evictions += 1
        self._images[key] = image
        self.used_bytes += image.nbytes
