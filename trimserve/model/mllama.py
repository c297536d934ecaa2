"""One loaded Mllama: prompt and images in, visual features, keys and values, and logits out.

Puts `processor.py`, `vision.py` and `decoder.py` together for one caller, the engine. It knows nothing about
queues, sampling or text.
"""

import time
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import MllamaForConditionalGeneration

from trimserve.api.chunks import ImageSelection
from trimserve.api.info import ModelInfo
from trimserve.api.prompt import ImageFile, Prompt
from trimserve.model.bucketed_decode import BucketedDecode, Capture, CudaGraphs
from trimserve.model.decoder import RaggedDecoder, SequenceRows
from trimserve.model.images import PreparedImage
from trimserve.model.interruptible import Interruptible, run_through
from trimserve.model.key_values import KeyValues
from trimserve.model.prefilled import Prefilled, TrimTimes
from trimserve.model.prepared import PreparedPrompt, TokenizedPrompt
from trimserve.model.processor import Processor
from trimserve.model.step_buffers import StepBuffers
from trimserve.model.visibility import visible_images
from trimserve.model.vision import IntermediateFeatures, VisionEncoder
from trimserve.model.vision_rows import VisionRows
from trimserve.trimming.encoded_image import EncodedImage, Observation
from trimserve.trimming.plan import Selection, TrimPlan, bitmap, choose_from_image, select
from trimserve.trimming.policies.policy import FirstLayer

__all__ = ["Mllama"]


class Mllama:
    """A model that is ready to serve."""

    def __init__(
        self,
        model: MllamaForConditionalGeneration,
        processor: Processor,
        info: ModelInfo,
        intermediate_features: IntermediateFeatures = "inputs",
        prototypes: Tensor | None = None,
        guide: "Mllama | None" = None,
    ) -> None:
        """Use `loading.load_model`."""
        self._prototypes = prototypes
        self._guide = guide
        self._processor = processor
        self._vision = VisionEncoder(model, intermediate_features)
        self._decoder = RaggedDecoder(model)
        self._device = model.device
        self._info = info
        self._bucketed: BucketedDecode | None = None

    @property
    def info(self) -> ModelInfo:
        """Geometry, limits and defaults."""
        return self._info

    @property
    def feature_bytes(self) -> int:
        """Bytes of one visual feature."""
        dtype: torch.dtype = getattr(torch, self._info.dtype)
        return self._info.hidden_size * dtype.itemsize

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, for incremental detokenisation."""
        return self._processor.tokenizer

    def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        """See `Processor.tokenize`; pure and thread-safe."""
        return self._processor.tokenize(prompt)

    def prepare_image(self, image: ImageFile) -> PreparedImage:
        """See `Processor.prepare_image`; pure and thread-safe."""
        return self._processor.prepare_image(image)

    def prepare(self, prompt: Prompt) -> PreparedPrompt:
        """See `Processor.prepare`; pure and thread-safe."""
        return self._processor.prepare(prompt)

    @torch.inference_mode()
    def encode_image(
        self, image: PreparedImage, needs: frozenset[Observation] = frozenset()
    ) -> Interruptible[EncodedImage]:
        """Visual features of one image; yields after each layer.

        Args:
            image: tiles.
            needs: what else is wanted, see `TrimPlan.needs`.
        """
        encoded = yield from self._vision.encode(image, needs)
        encoded.prototypes = self._prototypes
        if self._guide is not None:
            encoded.guide_bytes = encoded.num_features * self._guide.feature_bytes
        return encoded

    @torch.inference_mode()
    def prefill(
        self, prompt: PreparedPrompt, images: Sequence[EncodedImage], trim: TrimPlan, kv: KeyValues
    ) -> Interruptible[Prefilled]:
        """Run the prompt and fill `kv`; yields after each layer.

        Args:
            prompt: token ids [T] and images.
            images: of the prompt, see `encode_image`; with what `trim` needs.
            trim: how to trim; without images it has no effect.
            kv: empty, with room for T positions.
        Returns:
            The logits that follow the prompt and the account of its visual features.
        """
        began_at = time.monotonic()
        if trim.is_before_decoder:
            for image in images:
                if not image.remembers(trim.choice_key):
                    choose_from_image(image, trim)
                    yield
        seen_by_guide = (yield from self._guide_looks(prompt, images, trim)) if trim.is_guided and images else None
        rows = self.prompt_rows(prompt, images, trim, kv, seen_by_guide)
        vision = rows.vision
        if vision is not None and vision.trim_times is not None:
            vision.trim_times = vision.trim_times._replace(began_at=began_at)
        logits = (yield from self._decoder.prefill(self._ids(prompt.token_ids), [rows]))[0]
        num_valid = tuple(image.num_features for image in images)
        max_features = self._info.max_tiles * self._info.features_per_tile
        selections: tuple[ImageSelection, ...] = ()
        if vision is not None and trim.request.return_selection:
            selections = self._selections(prompt.images, num_valid, vision.selection)
        return Prefilled(
            logits=logits,
            num_padding=tuple(max_features - n for n in num_valid),
            num_valid=num_valid,
            num_kept=vision.layer_rows[0] if vision else (),
            num_merged=vision.num_merged if vision else (),
            selections=selections,
            trim_times=vision.trim_times if vision else None,
            later_trim_times=tuple(vision.later_trim_times) if vision else (),
            layer_rows=self._layer_rows(vision) if vision else (),
        )

    @torch.inference_mode()
    def warm_up_decode(self, pages: Tensor, max_batch: int, capture: Capture | None = None) -> None:
        """Make decode steps ready for batches whose keys and values lie in one pool.

        Args:
            pages: see `KeyValues.pages`.
            max_batch: sequences that decode together, at most.
            capture: how a step is made ready; None: as a CUDA graph. On a CPU that is nothing.
        """
        if capture is None:
            if self._device.type == "cpu":
                return
            capture = CudaGraphs()
        self._bucketed = self._decoder.bucketed(StepBuffers(self._info, pages, max_batch), capture)

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int], kvs: Sequence[KeyValues]) -> Tensor:
        """One step of several sequences.

        Args:
            token_ids: [B], each sequence's last token.
            kvs: [B], each one position longer afterwards.
        Returns:
            float32 logits [B, vocab_size]; they hold until the next step.
        """
        if self._bucketed is not None and self._bucketed.takes(kvs):
            return self._bucketed(token_ids, kvs)
        return self._decoder.decode(self._ids(token_ids), kvs)

    @torch.inference_mode()
    def logits(self, prompts: Sequence[SequenceRows], token_ids: Sequence[int], *, all_rows: bool = True) -> Tensor:
        """Logits [R, vocab_size] of every row of several prompts, or of each one's last; for evaluation and tests."""
        return run_through(self._decoder.prefill(self._ids(token_ids), prompts, all_rows=all_rows))

    def prompt_rows(
        self,
        prompt: PreparedPrompt,
        images: Sequence[EncodedImage],
        trim: TrimPlan,
        kv: KeyValues,
        seen_by_guide: FirstLayer | None = None,
    ) -> SequenceRows:
        """A prompt as rows of a ragged batch, chosen from already by a policy before the decoder; as in `prefill`.

        Args:
            prompt: see `prefill`.
            images: see `prefill`.
            trim: see `prefill`.
            kv: see `prefill`.
            seen_by_guide: what the guide knows of the images; None: it is asked here, if `trim` wants that.
        """
        vision = self._vision_rows(prompt, images, trim) if images else None
        began_at = time.monotonic()
        selection = None
        if vision is not None and trim.is_before_decoder:
            selection = Selection.of([choose_from_image(image, trim) for image in images], vision.num_features)
        elif vision is not None and trim.is_guided:
            selection = select(seen_by_guide or run_through(self._guide_looks(prompt, images, trim)), trim)
        if vision is not None and selection is not None:
            selected_at = time.monotonic()
            vision.hold(selection)
            vision.trim_times = TrimTimes(began_at, selected_at, time.monotonic())
        return SequenceRows(len(prompt.token_ids), kv, vision)

    @torch.inference_mode()
    def look(self, prompt: PreparedPrompt, images: Sequence[EncodedImage], trim: TrimPlan) -> Interruptible[FirstLayer]:
        """What the first cross-attention layer knows of a prompt's images, for a model that this one guides.

        Args:
            prompt: token ids [T].
            images: of the prompt, at least one, as this model sees them.
            trim: whether picks are wanted.
        """
        rows = SequenceRows(len(prompt.token_ids), None, self._vision_rows(prompt, images, trim))
        return (yield from self._decoder.first_layer(self._ids(prompt.token_ids), rows))

    @torch.inference_mode()
    def _guide_looks(
        self, prompt: PreparedPrompt, images: Sequence[EncodedImage], trim: TrimPlan
    ) -> Interruptible[FirstLayer]:
        assert self._guide is not None, "requests name `guided` only where there is a guide"
        seen = []
        for prepared, image in zip(prompt.images, images, strict=True):
            if image.guide is None:
                image.guide = yield from self._guide.encode_image(prepared)
            seen.append(image.guide)
        return (yield from self._guide.look(prompt, seen, trim))

    def _vision_rows(self, prompt: PreparedPrompt, images: Sequence[EncodedImage], trim: TrimPlan) -> VisionRows:
        visible = visible_images(prompt.token_ids, self._info.image_token_id)
        counts = tuple(image.num_features for image in images)
        features = images[0].features if len(images) == 1 else torch.cat([image.features for image in images])
        return VisionRows(features, counts, visible, self._info.features_per_tile, trim)

    def _layer_rows(self, vision: VisionRows) -> tuple[tuple[int, ...], ...]:
        first, *later = vision.layer_rows
        if not vision.has_left and all(rows == first for rows in later):
            return ()
        num_left_out = self._info.num_cross_attention_layers - len(vision.layer_rows)
        return (first, *later, *[(0,) * len(first)] * num_left_out)

    def _ids(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor(list(token_ids), dtype=torch.int64, device=self._device)

    def _selections(
        self, images: Sequence[PreparedImage], num_valid: Sequence[int], selection: Selection | None
    ) -> tuple[ImageSelection, ...]:
        selections = []
        start = 0
        for image, n in zip(images, num_valid, strict=True):
            kept = torch.arange(n, device="cpu")
            picks: tuple[bytes, ...] = ()
            if selection is not None:
                kept = _within(selection.kept, start, n)
                picks = tuple(bitmap(_within(head, start, n), n) for head in selection.picks)
            selections.append(
                ImageSelection(
                    tiles_high=image.tiles_high,
                    tiles_wide=image.tiles_wide,
                    features_per_tile=self._info.features_per_tile,
                    content_height=image.content_height,
                    content_width=image.content_width,
                    kept=bitmap(kept, n),
                    picks_by_head=picks,
                )
            )
            start += n
        return tuple(selections)


def _within(indices: Tensor, start: int, num_features: int) -> Tensor:
    """The indices in [start, start + num_features), counted from `start`."""
    return indices[(indices >= start) & (indices < start + num_features)] - start
