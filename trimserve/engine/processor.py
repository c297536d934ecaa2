"""What the engine needs to prepare requests: the seam that the checkpoint's processor fills, and a fake in tests."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from tokenizers import Tokenizer

from trimserve.api.prompt import ImageFile, Prompt
from trimserve.model.prepared import PreparedImage, TokenizedPrompt

__all__ = ["Processor"]


class Processor(Protocol):
    """Makes token ids and tiles of what a client sends; thread-safe."""

    @property
    def tokenizer(self) -> Tokenizer:
        """For incremental detokenisation."""

    def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        """Tokenise, decode no image; quick, pure and thread-safe, called in worker threads.

        Raises:
            InvalidRequest: image count, empty or too long prompt.
        """

    def prepare_images(self, images: Iterable[ImageFile]) -> Iterator[PreparedImage]:
        """Decode the images of a prompt one by one, as they are asked for; slow, iterated in worker threads.

        Raises:
            InvalidRequest: bad image, or too many pixels.
        """
