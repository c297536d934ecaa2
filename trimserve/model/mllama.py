"""One loaded Mllama: prompt and images in, visual features, keys and values, and logits out.

Puts `vision.py` and `decoder.py` together, with `processor.py` beside them. It knows nothing about queues, sampling or
text, and reserves no pages.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from trimserve.api.chunks import ImageSelection
from trimserve.api.info import ModelInfo
from trimserve.api.prompt import ImageFile, Prompt
from trimserve.model.adapter_files import read_adapter
from trimserve.model.adapters import Adapter
from trimserve.model.bucketed_decode import BucketedDecode, Capture, CudaGraphs
from trimserve.model.decode_rows import NewRows
from trimserve.model.decoder import RaggedDecoder, SequenceRows
from trimserve.model.differentiable import DifferentiableDecoder
from trimserve.model.interruptible import Interruptible, run_through
from trimserve.model.key_values import KeyValues
from trimserve.model.prefilled import Prefilled, ToPrefill, TrimTimes
from trimserve.model.prepared import PreparedImage, PreparedPrompt, TokenizedPrompt
from trimserve.model.processor import Processor
from trimserve.model.ranks import ALONE, Ranks
from trimserve.model.step_buffers import StepBuffers
from trimserve.model.transformers_mllama import MllamaForConditionalGeneration
from trimserve.model.visibility import visible_images
from trimserve.model.vision import IntermediateFeatures, VisionEncoder
from trimserve.model.vision_rows import VisionRows
from trimserve.ops.upload import upload_ids
from trimserve.trimming.compressor import Compressor
from trimserve.trimming.encoded_image import EncodedImage, Observation
from trimserve.trimming.feature_kv import FeatureKeyValues
from trimserve.trimming.plan import TrimPlan, bitmap, choose_from_image, select
from trimserve.trimming.policies.policy import CrossAttentionView, Place
from trimserve.trimming.selection import AHEAD, KeptSets, Selection
from trimserve.trimming.trained import Trained

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
        trained: Mapping[str, Trained] | None = None,
        guide: "Mllama | None" = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Use `loading.load_model`."""
        self._prototypes = prototypes
        self._trained = trained or {}
        self._guide = guide
        self._processor = processor
        self._model = model
        self._vision = VisionEncoder(model, intermediate_features)
        self._ranks = ranks
        self._decoder = RaggedDecoder(model, ranks)
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
        return self._info.hidden_size * self._dtype.itemsize

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._info.dtype)
        return dtype

    @property
    def _kv_row_bytes(self) -> int:
        """Of one visual feature's keys and values in one layer, as they are computed: of the heads that lie here."""
        num_heads = self._info.num_kv_heads // self._info.tensor_parallel
        return 2 * num_heads * self._info.head_dim * self._dtype.itemsize

    @property
    def _made_rows(self) -> int:
        """Rows that compressors make of a tile whatever the question."""
        fixed = (each for each in self._trained.values() if isinstance(each, Compressor) and not each.reads_text)
        return sum(each.shape.rows - 1 for each in fixed)

    @property
    def processor(self) -> Processor:
        """Prepares prompts and images; computes nothing on the device, so that another process may have its own."""
        return self._processor

    # ---- preparation, see `Processor` ----

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, for incremental detokenisation."""
        return self._processor.tokenizer

    def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        """See `Processor.tokenize`; pure and thread-safe."""
        return self._processor.tokenize(prompt)

    def prepare_images(self, images: Iterable[ImageFile]) -> Iterator[PreparedImage]:
        """See `Processor.prepare_images`; pure and thread-safe."""
        return self._processor.prepare_images(images)

    def prepare(self, prompt: Prompt) -> PreparedPrompt:
        """See `Processor.prepare`; pure and thread-safe."""
        return self._processor.prepare(prompt)

    def load_adapter(self, folder: Path) -> Adapter:
        """Read an adapter of this model; another thread may compute meanwhile. See `adapter_files.read_adapter`."""
        return read_adapter(folder, self._model, self._dtype)

    def forget_adapter(self, adapter: Adapter) -> None:
        """See `RaggedDecoder.forget_adapter`."""
        self._decoder.forget_adapter(adapter)

    # ---- computation ----

    @torch.inference_mode()
    def encode_image(
        self, image: PreparedImage, needs: frozenset[Observation] = frozenset(), adapter: Adapter | None = None
    ) -> Interruptible[EncodedImage]:
        """Visual features of one image; yields after each layer.

        Args:
            image: tiles.
            needs: what else is wanted, see `TrimPlan.needs`.
            adapter: None is the base model; one without `image_key` gives the same features.
        """
        encoded = yield from self._vision.encode(image, needs, adapter)
        encoded.prototypes = self._prototypes
        encoded.trained = self._trained
        encoded.made_bytes = self._made_rows * image.num_tiles * self.feature_bytes
        if self._guide is not None:
            encoded.guide_bytes = encoded.num_features * self._guide.feature_bytes
        # On other devices only the first layer always projects all features, see `FeatureKeyValues.serves`.
        encoded.num_kv_layers = self._info.num_cross_attention_layers if self._device.type == "cpu" else 1
        encoded.kv_layer_bytes = encoded.num_features * self._kv_row_bytes
        return encoded

    @torch.inference_mode()
    def prefill_together(self, prompts: Sequence[ToPrefill]) -> Interruptible[list[Prefilled]]:
        """Run prompts in one pass over the layers and fill their `kv`; yields after each layer.

        Args:
            prompts: at least one.
        Returns:
            Of each the logits that follow it and the account of its visual features.
        """
        rows: list[SequenceRows] = []
        for each in prompts:
            own = yield from self._prompt_rows(each)
            rows.append(own)
        token_ids = [token_id for each in prompts for token_id in each.prompt.token_ids]
        logits = yield from self._decoder.prefill(self._ids(token_ids), rows)
        return [self._prefilled(*each) for each in zip(prompts, rows, logits, strict=True)]

    def prefill(
        self,
        prompt: PreparedPrompt,
        images: Sequence[EncodedImage],
        trim: TrimPlan,
        kv: KeyValues,
        stored: KeptSets | None = None,
    ) -> Interruptible[Prefilled]:
        """`prefill_together` of one prompt; see `ToPrefill`."""
        return (yield from self.prefill_together([ToPrefill(prompt, images, trim, kv, stored)]))[0]

    @torch.inference_mode()
    def warm_up_decode(self, pages: Tensor, max_batch: int, capture: Capture | None = None) -> None:
        """Capture decode steps for batches whose keys and values lie in one pool.

        Args:
            pages: see `KeyValues.pages`.
            max_batch: most rows of a step; larger steps run layer by layer.
            capture: how a step is made ready; None captures CUDA graphs on a GPU, and nothing on a CPU or on several
                ranks.
        """
        if capture is None:
            if self._device.type == "cpu" or self._ranks.shard.size > 1:
                return
            capture = CudaGraphs()
        self._bucketed = self._decoder.bucketed(StepBuffers(self._info, pages, max_batch), capture)

    @torch.inference_mode()
    def decode(
        self, token_ids: Sequence[int] | Tensor, kvs: Sequence[KeyValues], num_rows: Sequence[int] | None = None
    ) -> Tensor:
        """One step of several sequences, with one or more new rows of each.

        Keys and values of all rows are stored first; then row i of a sequence attends to what the sequence held before
        and to its own first i + 1 rows, and all rows see the features that the sequence holds.

        Args:
            token_ids: [R], the new tokens of the first sequence, then of the second, and so on; a tensor is int64, on
                the model's device.
            kvs: [B], with granted pages for the new rows; each as much longer afterwards.
            num_rows: [B], new rows of each, at least 1; None if each has one.
        Returns:
            float32 logits [R, vocab_size] of every row; they hold until the next step.
        """
        new = NewRows.of(kvs, num_rows)
        if self._bucketed is not None and self._bucketed.takes(new):
            logits = self._bucketed(token_ids, new)
        else:
            logits = self._decoder.decode(self._ids(token_ids), new)
        new.stored()
        return logits

    @torch.inference_mode()
    def logits(self, prompts: Sequence[SequenceRows], token_ids: Sequence[int], *, all_rows: bool = True) -> Tensor:
        """Logits [R, vocab_size] of every row of several prompts, or of each one's last; for evaluation and tests."""
        return run_through(self._decoder.prefill(self._ids(token_ids), prompts, all_rows=all_rows))

    @torch.inference_mode()
    def prompt_rows(
        self, prompt: PreparedPrompt, images: Sequence[EncodedImage], trim: TrimPlan, kv: KeyValues
    ) -> SequenceRows:
        """A prompt as rows of a ragged batch; what is chosen before the decoder is chosen. See `ToPrefill`."""
        return run_through(self._prompt_rows(ToPrefill(prompt, images, trim, kv)))

    @torch.inference_mode()
    def look(
        self, prompt: PreparedPrompt, images: Sequence[EncodedImage], trim: TrimPlan
    ) -> Interruptible[CrossAttentionView]:
        """What the first cross-attention layer computes from a prompt's images, for a model that this one guides.

        Args:
            prompt: token ids [T].
            images: of the prompt, at least one, as this model sees them.
            trim: whether picks are wanted.
        """
        vision = self._vision_rows(prompt, images, trim, [None] * len(images))
        rows = SequenceRows(len(prompt.token_ids), None, vision)
        return (yield from self._decoder.look(self._ids(prompt.token_ids), rows))

    def _prompt_rows(self, wanted: ToPrefill) -> Interruptible[SequenceRows]:
        prompt, images, trim, kv, stored = wanted.prompt, wanted.images, wanted.trim, wanted.kv, wanted.stored
        began_at = time.monotonic()
        rows = SequenceRows(len(prompt.token_ids), kv)
        if images:
            if stored is None:
                selection = yield from self._choose_ahead(prompt, images, trim)
            else:
                kept = stored.made_after(AHEAD)
                selection = None if kept is None else kept.selection(self._device)
            owner = b"" if kv.adapter is None else kv.adapter.kv_key
            known = [image.keys_values.get(owner) for image in images]
            rows.vision = vision = self._vision_rows(prompt, images, trim, known, stored)
            if selection is not None:
                selected_at = time.monotonic()
                vision.hold(selection)
                vision.trim_times.append(TrimTimes(began_at, selected_at, time.monotonic()))
        return rows

    def _prefilled(self, wanted: ToPrefill, rows: SequenceRows, logits: Tensor) -> Prefilled:
        num_valid = tuple(image.num_features for image in wanted.images)
        max_features = self._info.max_tiles * self._info.features_per_tile
        num_padding = tuple(max_features - n for n in num_valid)
        vision = rows.vision
        if vision is None:
            return Prefilled(logits, num_padding, num_valid, num_kept=())
        times = vision.trim_times
        num_merged = vision.num_merged or (0,) * len(num_valid)
        selections: tuple[ImageSelection, ...] = ()
        if wanted.trim.return_selection:
            selections = self._selections(wanted.prompt.images, num_valid, vision.selection)
        return Prefilled(
            logits=logits,
            num_padding=num_padding,
            num_valid=num_valid,
            num_kept=tuple(rows - merged for rows, merged in zip(vision.layer_rows[0], num_merged, strict=True)),
            num_merged=vision.num_merged,
            selections=selections,
            trim_times=times[0] if times else None,
            later_trim_times=tuple(times[1:]),
            layer_rows=self._layer_rows(vision),
            kept_sets=vision.kept_sets,
        )

    def _choose_ahead(
        self, prompt: PreparedPrompt, images: Sequence[EncodedImage], trim: TrimPlan
    ) -> Interruptible[Selection | None]:
        """Choose before the decoder runs, if the policy does that."""
        if trim.place is Place.BEFORE_DECODER:
            choices = []
            for index, image in enumerate(images):
                if not self._ranks.shard.rank:
                    text = self._text_about(prompt, index) if trim.reads_text else None
                    choices.append(choose_from_image(image, trim, text))
                yield
            return self._chosen(lambda: Selection.of(choices, [image.num_features for image in images]))
        if trim.place is Place.IN_GUIDE:
            assert self._guide is not None, "requests name such a policy only if there is a guide"
            seen = []
            for prepared, image in zip(prompt.images, images, strict=True):
                if image.guide is None:
                    image.guide = yield from self._guide.encode_image(prepared)
                seen.append(image.guide)
            view = yield from self._guide.look(prompt, seen, trim)
            return self._chosen(lambda: select(view, trim))
        return None

    def _text_about(self, prompt: PreparedPrompt, image: int) -> Tensor:
        """Mean embedding of the tokens that see an image, float32 [D]."""
        visible = visible_images(prompt.token_ids, self._info.image_token_id)
        seeing = [
            token_id for token_id, (first, end) in zip(prompt.token_ids, visible, strict=True) if first <= image < end
        ]
        return self._decoder.embed(self._ids(seeing)).float().mean(dim=0)

    def _chosen(self, choose: Callable[[], Selection]) -> Selection:
        selection = self._ranks.decide(choose, self._device)
        assert isinstance(selection, Selection)
        return selection

    def differentiable(self) -> DifferentiableDecoder:
        """The decoder for training what stands before it; see there."""
        return DifferentiableDecoder(self._model, self._info.head_dim)

    def _vision_rows(
        self,
        prompt: PreparedPrompt,
        images: Sequence[EncodedImage],
        trim: TrimPlan,
        known: list[FeatureKeyValues | None],
        stored: KeptSets | None = None,
    ) -> VisionRows:
        visible = visible_images(prompt.token_ids, self._info.image_token_id)
        counts = tuple(image.num_features for image in images)
        features = images[0].features if len(images) == 1 else torch.cat([image.features for image in images])
        size = self._info.features_per_tile
        return VisionRows(features, counts, visible, size, trim, known, stored, self._trained)

    def _layer_rows(self, vision: VisionRows) -> tuple[tuple[int, ...], ...]:
        first, *later = vision.layer_rows
        if not vision.has_left and all(rows == first for rows in later):
            return ()
        num_left_out = self._info.num_cross_attention_layers - len(vision.layer_rows)
        return (first, *later, *[(0,) * len(first)] * num_left_out)

    def _ids(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        return token_ids if isinstance(token_ids, Tensor) else upload_ids(token_ids, self._device)

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
