"""A model in miniature: the next token is a function of the token ids that its KV really holds.

Whoever mixes up rows, loses a position or reuses released KV gets other tokens. Some prompts misbehave on
purpose, so that tests can aim a failure at one request.
"""

import io
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image as PILImage
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from tests.model_info import SMALL
from trimserve.api.info import GenerationDefaults
from trimserve.api.prompt import ImageFile, Prompt, RawPrompt, TokenPrompt
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.errors import AdapterError, InvalidRequest
from trimserve.model.adapters import Adapter, Change
from trimserve.model.interruptible import Interruptible
from trimserve.model.key_values import KeyValues
from trimserve.model.prefilled import Prefilled, ToPrefill
from trimserve.model.prepared import PreparedImage, PreparedPrompt, TokenizedPrompt
from trimserve.trimming.budget import HeadRatio
from trimserve.trimming.encoded_image import EncodedImage, Observation
from trimserve.trimming.plan import TrimPlan
from trimserve.trimming.policies.table import POLICIES

__all__ = [
    "BREAKS_DECODE",
    "BREAKS_PREFILL",
    "BREAKS_PREPARE",
    "END",
    "IMAGE",
    "KILLS_THE_ENGINE",
    "LOGITS_ARE_NAN",
    "FakeModel",
    "byte_tokenizer",
    "request",
]

END = 256
"""The end token; ids below are bytes."""
IMAGE = 257
"""The image token, past the logits."""
FEATURES_PER_TILE = 5

BREAKS_PREPARE = RawPrompt("!prepare")
BREAKS_PREFILL = RawPrompt("!prefill")
BREAKS_DECODE = RawPrompt("!decode")
LOGITS_ARE_NAN = RawPrompt("!nan")
KILLS_THE_ENGINE = RawPrompt("!kill")


class Killed(BaseException):
    """What no handler for ordinary exceptions catches."""


@dataclass
class FakeModel:
    """Answers at random, or as `replies` says: the text that follows a prompt's text, then the end token."""

    replies: dict[str, str | tuple[int, ...]] = field(default_factory=dict)
    max_model_len: int = 128
    before_tokenize: Callable[[], object] = bool
    before_image: Callable[[], object] = bool
    before_prefill: Callable[[], object] = bool
    before_decode: Callable[[], object] = bool
    before_layer: Callable[[], object] = bool
    before_adapter: Callable[[], object] = bool
    batch_sizes: list[int] = field(default_factory=list)
    """Rows of each decode so far."""
    passes: list[int] = field(default_factory=list)
    """Prompts of each prefill so far."""
    threads: set[str] = field(default_factory=set)
    """Names of the threads that ran prefill or decode."""
    encoded: list[bytes] = field(default_factory=list)
    """Images that were encoded, in the order in which that began."""
    images: list[str] = field(default_factory=list)
    """Fields of the images that were prepared, in the order in which that began."""

    def __post_init__(self) -> None:
        self.tokenizer: Tokenizer = byte_tokenizer()
        self.info = replace(
            SMALL,
            image_token_id=IMAGE,
            max_model_len=self.max_model_len,
            num_self_attention_layers=2,
            num_cross_attention_layers=3,
            num_heads=2,
            head_dim=1,
            hidden_size=2,
            intermediate_size=6,
            tile_size=8,
            patch_size=4,
            features_per_tile=FEATURES_PER_TILE,
            kv_bytes_per_position=8,
            default_k_ratio=0.5,
            policy_details=tuple(policy.describe() for policy in POLICIES.values()),
            generation_defaults=GenerationDefaults(0.0, 1.0, 0, 0.0, 1.0, max_new_tokens=20, eos_token_ids=(END,)),
        )

    def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        self.before_tokenize()
        if prompt == BREAKS_PREPARE:
            raise Killed  # as a panic in the tokenizer's compiled code would
        match prompt:
            case RawPrompt(text="") | TokenPrompt(token_ids=()):
                raise InvalidRequest("prompt", "must not be empty")
            case RawPrompt(text, images):
                token_ids = tuple(text.encode())
            case TokenPrompt(token_ids, images):
                pass
            case _:
                raise TypeError(f"the fake has no chat template for {prompt!r}")
        return TokenizedPrompt(token_ids, images)

    def prepare_images(self, images: Iterable[ImageFile]) -> Iterator[PreparedImage]:
        return map(self.prepare_image, images)

    def prepare_image(self, image: ImageFile) -> PreparedImage:
        self.images.append(image.field)
        self.before_image()
        num_tiles = _num_tiles(image)
        return PreparedImage(torch.zeros(4, 3, 8, 8), 1, 1, num_tiles, 8, 8 * num_tiles, image.data)

    def load_adapter(self, folder: Path) -> Adapter:
        """Adapters without weights: those in a folder `vision` have images of their own, those in `broken` are."""
        self.before_adapter()
        if folder.name == "broken":
            raise AdapterError(f"{folder}: is broken")
        changes: dict[torch.nn.Module, Change] = {torch.nn.Identity(): Change(weight=torch.zeros(3))}
        return Adapter(changes, ("lm_head",), rank=4, image_key=b"own" if folder.name == "vision" else b"", kv_key=b"")

    def forget_adapter(self, adapter: Adapter) -> None:
        """It holds none."""

    def encode_image(
        self,
        image: PreparedImage,
        needs: frozenset[Observation] = frozenset(),
        adapter: Adapter | None = None,  # noqa: ARG002 - as in a model
    ) -> Interruptible[EncodedImage]:
        self.encoded.append(image.key)
        yield
        self.before_layer()
        num_features = image.num_tiles * FEATURES_PER_TILE
        observed = {name: torch.ones(1, num_features) for name in needs}
        return EncodedImage(torch.ones(num_features, 2), FEATURES_PER_TILE, 1, observed)

    def prefill_together(self, prompts: Sequence[ToPrefill]) -> Interruptible[list[Prefilled]]:
        self.passes.append(len(prompts))
        prefilled: list[Prefilled] = []
        for each in prompts:
            one = yield from self._prefill(each.prompt, each.images, each.trim, each.kv)
            prefilled.append(one)
        return prefilled

    def _prefill(
        self, prompt: PreparedPrompt, images: Sequence[EncodedImage], trim: TrimPlan, kv: KeyValues
    ) -> Interruptible[Prefilled]:
        self.before_prefill()
        self.threads.add(threading.current_thread().name)
        if _text(prompt.token_ids) == BREAKS_PREFILL.text:
            raise RuntimeError("prefill broke")
        num_valid = tuple(image.num_features for image in images)
        ratio = 1.0
        if trim.policy is not None:
            assert isinstance(trim.allowance.budget, HeadRatio)
            ratio = trim.allowance.budget.ratio
        num_kept = tuple(math.ceil(ratio * valid) for valid in num_valid)
        num_merged = tuple(
            math.ceil(trim.merge_ratio * (n - kept)) for n, kept in zip(num_valid, num_kept, strict=True)
        )
        num_rows = tuple(map(sum, zip(num_kept, num_merged, strict=True)))
        # As with decoded rows of a real model: only the last image is still seen.
        num_held = num_rows[-1] if num_rows else 0
        yield
        self.before_layer()
        for layer in range(self.info.num_cross_attention_layers):
            kv.hold_features(layer, num_held, None)
        return Prefilled(
            logits=self._forward(prompt.token_ids, kv),
            num_padding=tuple((4 - image.num_tiles) * FEATURES_PER_TILE for image in prompt.images),
            num_valid=num_valid,
            num_kept=num_kept,
            num_merged=num_merged if trim.merge_ratio else (),
        )

    def warm_up_decode(self, pages: Tensor, max_batch: int) -> None:
        """No step is slower than another."""

    def decode(
        self, token_ids: Sequence[int] | Tensor, kvs: Sequence[KeyValues], num_rows: Sequence[int] | None = None
    ) -> Tensor:
        self.before_decode()
        self.batch_sizes.append(len(kvs))
        self.threads.add(threading.current_thread().name)
        rows = [kv for kv, count in zip(kvs, num_rows or [1] * len(kvs), strict=True) for _ in range(count)]
        ids = [int(token_id) for token_id in token_ids]
        return torch.stack([self._forward([token_id], kv) for token_id, kv in zip(ids, rows, strict=True)])

    def _forward(self, token_ids: Sequence[int], kv: KeyValues) -> Tensor:
        # One page holds 16 positions of one layer here: keys of the last layer tell the history.
        table = kv.self_tables[-1]
        for position, token_id in enumerate(token_ids, start=kv.length):
            kv.pages[table[position // 16], 0, :, 0, position % 16, 0] = token_id
        kv.length += len(token_ids)
        history = [int(kv.pages[table[p // 16], 0, 0, 0, p % 16, 0]) for p in range(kv.length)]
        text = _text(history)
        if text.startswith(BREAKS_DECODE.text) and len(history) > len(BREAKS_DECODE.text) + 1:
            raise RuntimeError("decode broke")
        if text.startswith(KILLS_THE_ENGINE.text):
            raise Killed
        if text.startswith(LOGITS_ARE_NAN.text) and len(history) > len(LOGITS_ARE_NAN.text) + 1:
            return torch.full((257,), torch.nan)
        return self._logits(history, text)

    def _logits(self, history: list[int], text: str) -> Tensor:
        for prompt, reply in self.replies.items():
            if text.startswith(prompt):
                answer = (*(reply.encode() if isinstance(reply, str) else reply), END)
                position = len(history) - len(prompt.encode())
                return (
                    torch.nn.functional.one_hot(torch.tensor(answer[min(position, len(answer) - 1)]), 257).float() * 50
                )
        # Printable ASCII, never the end token.
        generator = torch.Generator().manual_seed(hash(tuple(history)) % 2**63)
        logits = torch.full((257,), -100.0)
        logits[32:127] = torch.randn(95, generator=generator) * 2
        return logits


def request(prompt: str | Prompt, *, name: str = "r", priority: int = 0, **sampling: object) -> GenerationRequest:
    """A request for `FakeModel`; further keywords are those of `SamplingParams`."""
    return GenerationRequest(
        request_id=name,
        prompt=RawPrompt(prompt) if isinstance(prompt, str) else prompt,
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]  # keywords of every type
        trim=TrimRequest(k_ratio=0.5),
        priority=priority,
    )


def byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> Tokenizer:
    """A byte-level BPE: ids 0 to 255 are bytes, 256 is special, then come `merges` of the byte alphabet."""
    vocab = {letter: byte for byte, letter in enumerate(_byte_alphabet())}
    vocab["<|end|>"] = END
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(BPE(vocab, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def _byte_alphabet() -> list[str]:
    # The alphabet of every byte-level BPE: printable bytes are themselves, the others move past U+00FF.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


def _text(token_ids: Sequence[int]) -> str:
    return bytes(token_id for token_id in token_ids if token_id < 256).decode(errors="replace")


def _num_tiles(image: ImageFile) -> int:
    if image.data.isdigit():
        return int(image.data)
    with PILImage.open(io.BytesIO(image.data)) as opened:
        opened.load()
    return 1
