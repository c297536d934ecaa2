"""What the engine needs to prepare requests: the seam that the checkpoint's processor fills, and a fake in tests."""

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
            InvalidRequest: image count or size, empty or too long prompt.
        """

    def prepare_image(self, image: ImageFile) -> PreparedImage:
        """Decode one image; slow, pure and thread-safe, called in worker threads.

        Raises:
            InvalidRequest: bad image.
        """
