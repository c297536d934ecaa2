"""Visual features of images seen before: another question on the same image skips the vision encoder.

Keyed by what the encoder sees (`PreparedImage.key`), so the same picture in another file format is another image
only if its pixels differ. Shared by requests and bounded in bytes; it never counts as trimming.
"""

from collections import OrderedDict

from torch import Tensor

__all__ = ["ImageCache"]


class ImageCache:
    """Least recently used first out. Belongs to the engine's thread; counters may be read from any."""

    def __init__(self, capacity_bytes: int) -> None:
        """Start empty.

        Args:
            capacity_bytes: of all features together, at least 0; 0 keeps nothing.
        """
        self.capacity_bytes = capacity_bytes
        """Most bytes it holds."""
        self.used_bytes = 0
        """Bytes of the features that it holds."""
        self.num_hits = 0
        """Images found."""
        self.num_misses = 0
        """Images that had to be encoded."""
        self.num_evictions = 0
        """Images whose features made room for others'."""
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes) -> Tensor | None:
        """Features of an image, [N, hidden_size], or None; they must not be changed."""
        features = self._features.get(key)
        if features is None:
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._features.move_to_end(key)
        return features

    def put(self, key: bytes, features: Tensor) -> None:
        """Keep an image's features, at the expense of those not used for the longest time.

        Features larger than the whole cache are not kept.
        """
        size = features.nbytes
        if size > self.capacity_bytes or key in self._features:
            return
        while self.used_bytes + size > self.capacity_bytes:
            _, oldest = self._features.popitem(last=False)
            self.used_bytes -= oldest.nbytes
            self.num_evictions += 1
        self._features[key] = features
        self.used_bytes += size
