"""What one image file may cost the process that decodes it."""

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that grow with the pixels of a file, so that a slow machine still decodes the largest honest ones.

    Before its header is read, a file counts as one of no pixels in time, and of `max_pixels` in memory.
    """

    max_pixels: int
    """Largest width times height."""
    cpu_seconds: float = 1.0
    """Processor time for a file of no pixels."""
    cpu_seconds_per_megapixel: float = 0.25
    """Several times what the slowest formats need; above 0."""
    memory_bytes: int = 64 * 2**20
    """Address space for a file of no pixels."""
    bytes_per_pixel: int = 20
    """Address space: coefficients or canvases of the decoder, the stored pixels, and the result."""
    copies: int = 4
    """Of the file itself, in memory."""
    wall_ratio: float = 4.0
    """Seconds on the clock for one of processor time, of a file of `max_pixels`: others want the processor too."""

    def cpu(self, num_pixels: int) -> float:
        """Seconds of processor time."""
        return self.cpu_seconds + self.cpu_seconds_per_megapixel * num_pixels / 1e6

    def memory(self, num_pixels: int, num_bytes: int) -> int:
        """Bytes of address space beyond what the process has when the file of so many bytes arrives."""
        return self.memory_bytes + self.bytes_per_pixel * num_pixels + self.copies * num_bytes

    @property
    def wall_seconds(self) -> float:
        """Seconds on the clock for any file."""
        return self.wall_ratio * self.cpu(self.max_pixels)
