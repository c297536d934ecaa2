"""A client's prompt into what the model reads: token ids and tiles.

The one place where prompts are checked against the tokenizer and the pixels. It knows nothing about weights.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Final

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from trimserve.api.info import ModelInfo
from trimserve.api.prompt import ChatPrompt, CloserPrompt, ImageFile, PlainPrompt, Prompt, RawPrompt, Text
from trimserve.errors import CheckpointError, InvalidRequest
from trimserve.imaging.decode import Decode, decode_pixels
from trimserve.model.chat import ChatEncoder
from trimserve.model.chat_template import TEMPLATE_DATE, ChatTemplate
from trimserve.model.images import crop, prepare_image
from trimserve.model.prepared import PreparedImage, PreparedPrompt, TokenizedPrompt

__all__ = ["REQUEST_PIXELS", "PreparedPrompt", "Processor"]

REQUEST_PIXELS: Final = 2
"""All images of a prompt together have at most this many times `max_image_pixels`: decoding them takes seconds."""


class Processor:
    """Prepares prompts; stateless after construction and thread-safe."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: MllamaImageProcessorPil,
        info: ModelInfo,
        template: ChatTemplate | None,
        *,
        max_image_pixels: int,
        decode: Decode | None = None,
    ) -> None:
        """Join a tokenizer and an image processor.

        Args:
            tokenizer: a fast tokenizer that knows the image token.
            image_processor: cuts images into tiles of `info.tile_size`, at most `info.max_tiles`.
            info: vocabulary, context and image limits.
            template: of conversations; None if the checkpoint has none.
            max_image_pixels: largest width times height of an image file, see `decode_pixels`.
            decode: decodes image files elsewhere; None decodes them in this process, for files that are trusted.
        """
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bos_token_id = tokenizer.bos_token_id
        self._chat = ChatEncoder(tokenizer, info.image_token_id, template)
        self._image_processor = image_processor
        self._info = info
        self._max_image_pixels = max_image_pixels
        self._decode = decode or (lambda data, field: nullcontext(decode_pixels(data, field, max_image_pixels)))
        # A token stands for at most as many characters as it has itself (byte-level: for as many bytes).
        longest_token = max(map(len, self._tokenizer.get_vocab()))
        self._max_characters = longest_token * info.max_model_len

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        info: ModelInfo,
        *,
        max_image_pixels: int,
        template_date: str = TEMPLATE_DATE,
        decode: Decode | None = None,
    ) -> "Processor":
        """Load the tokenizer and the image processor of a checkpoint.

        Args:
            folder: of the checkpoint.
            info: what the model's config says.
            max_image_pixels: see the constructor.
            template_date: what the chat template shows as today's date; Llama's own by default.
            decode: see the constructor.
        Raises:
            CheckpointError: missing or unreadable files, a chat template that cannot be used, or a disagreement with
                the model's config.
        """
        tokenizer = _load_tokenizer(folder, info)
        image_processor = _load_image_processor(folder, info)
        template = ChatTemplate.read(folder, tokenizer, template_date)
        return cls(tokenizer, image_processor, info, template, max_image_pixels=max_image_pixels, decode=decode)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer itself, special tokens on, without truncation or padding. Not to be changed."""
        return self._tokenizer

    def prepare(self, prompt: Prompt) -> PreparedPrompt:
        """Tokenise a prompt and decode its images: `tokenize`, then `prepare_images`."""
        tokenized = self.tokenize(prompt)
        return PreparedPrompt(tokenized.token_ids, tuple(self.prepare_images(tokenized.images)))

    def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        """Tokenise a prompt and check all that can be checked without opening an image file.

        Chat messages are rendered with the chat template, which writes the special tokens. A raw prompt may
        contain special tokens itself; begin-of-text is put behind its leading image tokens unless the prompt
        has it anywhere, as transformers does. Token ids are taken as they are. Ids that the tokenizer knows
        but the model has no logit for are refused, but for the image token's. A region of an image that is to be
        looked at again gets an image token of its own, right behind the image's.

        Raises:
            InvalidRequest: an empty prompt, one that leaves no room for a new token, ids outside the
                vocabulary, image tokens and images that do not match in number, too many images, or a
                conversation that `ChatEncoder.encode` refuses.
        """
        if isinstance(prompt, CloserPrompt):
            return self.tokenize(prompt.prompt).closer(prompt.region, self._info.image_token_id)
        field, images = _field_of(prompt), _images_of(prompt)
        images_field = field if isinstance(prompt, ChatPrompt) else "images"
        if len(images) > self._info.max_images:
            raise InvalidRequest(images_field, f"must have at most {self._info.max_images} images, got {len(images)}")
        token_ids = self._token_ids(field, prompt)
        self._check_token_ids(field, token_ids)
        num_image_tokens = sum(token_id == self._info.image_token_id for token_id in token_ids)
        if num_image_tokens != len(images):
            raise InvalidRequest(images_field, _mismatch(prompt, num_image_tokens, len(images)))
        return TokenizedPrompt(tuple(token_ids), tuple(images))

    def prepare_images(self, images: Iterable[ImageFile]) -> Iterator[PreparedImage]:
        """Decode the images of a prompt one by one, as they are asked for, and cut each, or its region, into tiles.

        Args:
            images: each is let go once it is decoded.
        Raises:
            InvalidRequest: `decode_pixels` refuses one, or they have too many pixels together.
        """
        num_pixels = 0
        for image in images:
            prepared, num_pixels = self._prepare_image(image, num_pixels)
            del image
            yield prepared

    def _prepare_image(self, image: ImageFile, num_before: int) -> tuple[PreparedImage, int]:
        with self._decode(image.data, image.field) as pixels:
            num_pixels = num_before + pixels.shape[0] * pixels.shape[1]
            most = REQUEST_PIXELS * self._max_image_pixels
            if num_pixels > most:
                bound = f"with the images before it must have at most {most} pixels"
                raise InvalidRequest(image.field, f"{bound}, got {num_pixels}")
            shown = pixels if image.region is None else crop(pixels, image.region)
            return prepare_image(shown, self._image_processor), num_pixels

    def _token_ids(self, field: str, prompt: PlainPrompt) -> Sequence[int]:
        if isinstance(prompt, ChatPrompt):
            parts = [part for message in prompt.messages for part in message.parts]
            self._check_characters(field, sum(len(part.text) for part in parts if isinstance(part, Text)))
            return self._chat.encode(prompt.messages)
        if isinstance(prompt, RawPrompt):
            if not prompt.text:
                raise InvalidRequest(field, "must not be empty")
            self._check_characters(field, len(prompt.text))
            return self._with_bos(self._tokenizer.encode(prompt.text, add_special_tokens=False).ids)
        return prompt.token_ids

    def _with_bos(self, token_ids: list[int]) -> list[int]:
        if self._bos_token_id is None or self._bos_token_id in token_ids:
            return token_ids
        leading = sum(1 for _ in takewhile(lambda id_: id_ == self._info.image_token_id, token_ids))
        return [*token_ids[:leading], self._bos_token_id, *token_ids[leading:]]

    def _check_characters(self, field: str, num_characters: int) -> None:
        # Before tokenising, which would take seconds and gigabytes for a text of 64 MiB.
        if num_characters > self._max_characters:
            bound = f"the context of {self._info.max_model_len} tokens"
            raise InvalidRequest(field, f"must leave room for a new token in {bound}, got {num_characters} characters")

    def _check_token_ids(self, field: str, token_ids: Sequence[int]) -> None:
        info = self._info
        if not token_ids:
            raise InvalidRequest(field, "must have at least 1 token, got 0")
        if len(token_ids) >= info.max_model_len:
            bound = f"must have at most {info.max_model_len - 1} tokens (the context less one new token)"
            raise InvalidRequest(field, f"{bound}, got {len(token_ids)}")
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id < info.vocab_size and token_id != info.image_token_id:
                bound = f"must be in [0, {info.vocab_size}) or the image token {info.image_token_id}"
                raise InvalidRequest(field, f"token ids {bound}, got {token_id} at position {position}")


def _field_of(prompt: PlainPrompt) -> str:
    if isinstance(prompt, ChatPrompt):
        return "chat.messages"
    return "raw_prompt" if isinstance(prompt, RawPrompt) else "prompt_token_ids"


def _mismatch(prompt: PlainPrompt, num_image_tokens: int, num_images: int) -> str:
    if isinstance(prompt, ChatPrompt):
        did = "dropped" if num_image_tokens < num_images else "added"
        return f"the chat template {did} images: it wrote {num_image_tokens} image tokens for {num_images} images"
    return f"must be as many as the prompt's image tokens, {num_image_tokens}, got {num_images}"


def _images_of(prompt: PlainPrompt) -> list[ImageFile]:
    if not isinstance(prompt, ChatPrompt):
        return list(prompt.images)
    return [part for message in prompt.messages for part in message.parts if isinstance(part, ImageFile)]


def _load_tokenizer(folder: Path, info: ModelInfo) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise whatever they meet in a broken file
        raise CheckpointError(f"{folder}: cannot load the tokenizer: {error}") from error
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        kind = type(tokenizer).__name__
        raise CheckpointError(f"{folder}: must have a fast tokenizer (tokenizer.json), got {kind}")
    if tokenizer.backend_tokenizer.id_to_token(info.image_token_id) is None:
        raise CheckpointError(
            f"{folder}: the config's image token {info.image_token_id} is not among the tokenizer's "
            f"{len(tokenizer)} tokens"
        )
    return tokenizer


def _load_image_processor(folder: Path, info: ModelInfo) -> MllamaImageProcessorPil:
    try:
        processor = MllamaImageProcessorPil.from_pretrained(folder)
    except Exception as error:  # as above
        raise CheckpointError(f"{folder}: cannot load the image processor: {error}") from error
    size, max_tiles = (processor.size["height"], processor.size["width"]), processor.max_image_tiles
    if size != (info.tile_size, info.tile_size) or max_tiles != info.max_tiles:
        raise CheckpointError(
            f"{folder}: the image processor cuts up to {max_tiles} tiles of {size[0]} x {size[1]} pixels, "
            f"the vision config takes {info.max_tiles} of {info.tile_size} x {info.tile_size}"
        )
    _try(folder, processor)
    return processor


def _try(folder: Path, processor: MllamaImageProcessorPil) -> None:
    """Prepare a white pixel, so that settings that work for no image are told at load and not by each request."""
    try:
        with np.errstate(all="ignore"):
            white = prepare_image(np.full((1, 1, 3), 255, dtype=np.uint8), processor)
    except Exception as error:  # as above
        raise CheckpointError(f"{folder}: the image processor takes no image: {error}") from error
    if not white.pixel_values.isfinite().all():
        settings = {name: getattr(processor, name) for name in ("image_mean", "image_std", "rescale_factor")}
        raise CheckpointError(f"{folder}: the image processor must give finite pixels, got {settings}")
