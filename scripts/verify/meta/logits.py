"""Logits of every row, beside Meta's: text, one to three images of every tile grid, prompts and decoded tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

from scripts.verify.meta.checkpoint import MAX_TILES, MetaGeometry
from scripts.verify.meta.judge import Judge, seen_by_all
from scripts.verify.meta.prompts import file_of, meta_raw, noise, our_raw
from trimserve.api.trim import TrimRequest
from trimserve.evaluation.pages import OwnPages
from trimserve.model.interruptible import run_through
from trimserve.model.mllama import Mllama
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.plan import TrimPlan

__all__ = [
    "CASES",
    "GEOMETRIES",
    "META_MASK",
    "REAL_TILES",
    "SWAP_FACTOR",
    "TOLERANCE",
    "Case",
    "Compared",
    "compare",
    "summed",
]

TOLERANCE = 2e-5
"""Of float32 logits with a standard deviation of about 2: rounding of other kernels and other shapes of products."""
SWAP_FACTOR = 100
"""So many tolerances another image must move the logits by: else a model that ignores it would pass."""

GRIDS = [(high, wide) for high, wide in get_all_supported_aspect_ratios(MAX_TILES)]
META_MASK = "the same with Meta's mask, which hides all images"
DECODED = (7, 3, 128009, 1917)

GEOMETRIES = {
    "8 + 2 layers, scaled positions": MetaGeometry(),
    "7 + 3 layers, large epsilon": MetaGeometry(
        dim=96,
        n_layers=7,
        n_heads=6,
        n_kv_heads=3,
        ffn_dim_multiplier=None,
        norm_eps=0.01,
        use_scaled_rope=False,
        vision_num_cross_attention_layers=3,
    ),
}
"""Text decoders; the vision encoder is always Meta's, narrower."""
REAL_TILES = replace(MetaGeometry(), vision_chunk_size=560)


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, and its images by the rows and columns of their tiles."""

    kind: str
    text: str
    grids: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Compared:
    """What some rows of a case came to."""

    kind: str
    rows: int
    difference: float
    """Largest, of all rows and logits."""
    moved: float | None = None
    """Largest change by another image in an image's place, of the image that changes least; None without images."""


def _cases() -> Iterator[Case]:
    yield Case("text only", "No image at all.")
    yield Case("text only", "Zwölf Boxkämpfer jagen 12345 Eulen über den großen Sylter Deich 🙂 " * 3)
    for grid in GRIDS:
        yield Case("one image, every tile grid", "<|image|>What is this?", (grid,))
        yield Case("text before the image", "Rows before it, then<|image|>and rows after.", (grid,))
        yield Case("two images", "<|image|>one, then<|image|>another: compare", (grid, (1, 2)))
        yield Case("two images", "Both at once:<|image|><|image|>compare", ((2, 1), grid))
        yield Case("three images", "<|image|><|image|>a pair, and later<|image|>the third", (grid, (1, 1), (1, 3)))
    yield Case("three images", "a<|image|>b<|image|>c<|image|>d", ((1, 4), (2, 2), (3, 1)))
    yield Case("three images", "<|image|><|image|><|image|>", ((1, 1), (4, 1), (2, 2)))


CASES = tuple(_cases())


def compare(ours: Mllama, judge: Judge, format_: Any, case: Case) -> list[Compared]:
    """Compare both models on a prompt and on tokens decoded after it.

    Args:
        ours: with the judge's weights.
        judge: Meta's model.
        format_: Meta's chat format.
        case: what to ask.
    Raises:
        SystemExit: token ids differ, or the logits hardly vary.
    """
    side = ours.info.tile_size
    images = [noise(wide * side, high * side, seed) for seed, (high, wide) in enumerate(case.grids)]
    files = [file_of(image) for image in images]
    prompt, prepared = format_.encode_content(meta_raw(case.text, files)), ours.prepare(our_raw(case.text, files))
    if prompt.tokens != list(prepared.token_ids):
        raise SystemExit(f"{case}: token ids {prepared.token_ids}, Meta's {prompt.tokens}")
    logits = our_logits(ours, prepared, DECODED)
    own = judge.logits(prompt, DECODED)
    expected = own if not images else judge.logits(prompt, DECODED, mask=seen_by_all(prompt, len(DECODED)))
    if expected.std() < 1:
        raise SystemExit(f"{case}: a standard deviation of {expected.std():.2f} is too small to tell anything")
    moves = [(swapped - expected).abs() for swapped in _swapped(judge, prompt, images)]
    length = len(prompt.tokens)
    where = {0: "text", 1: "one image"}.get(len(images), "several images")
    found = [
        _compared(case.kind, logits, expected, moves, slice(0, length)),
        _compared(f"tokens decoded after {where}", logits, expected, moves, slice(length, None)),
    ]
    if len(images) > 1:  # Meta's own mask: these rows see no image, which is the one thing that is otherwise here
        found.append(_compared(META_MASK, logits, own, [], slice(length, None)))
    return found


@torch.inference_mode()
def our_logits(model: Mllama, prompt: PreparedPrompt, decoded: Sequence[int]) -> Tensor:
    """Untrimmed logits [T + decoded, vocab_size] of a prompt and of one token after the other."""
    images = [run_through(model.encode_image(image)) for image in prompt.images]
    pages = OwnPages(model.info, 2**24)
    num_features = sum(image.num_features for image in images)
    kv = pages.key_values(len(prompt.token_ids) + len(decoded), num_features)
    rows = model.prompt_rows(prompt, images, TrimPlan.of(TrimRequest(enabled=False)), kv)
    of_prompt = model.logits([rows], prompt.token_ids)
    return torch.cat([of_prompt, *(model.decode([token], [kv]).clone() for token in decoded)])


def summed(found: Sequence[Compared]) -> list[dict[str, Any]]:
    """One line for each kind: how many cases and rows, the largest difference, the smallest move."""
    lines = []
    for kind in dict.fromkeys(each.kind for each in found):
        of_kind = [each for each in found if each.kind == kind]
        moves = [each.moved for each in of_kind if each.moved is not None]
        lines.append(
            {
                "kind": kind,
                "cases": len(of_kind),
                "rows": sum(each.rows for each in of_kind),
                "largest_difference": max(each.difference for each in of_kind),
                "smallest_difference": min(each.difference for each in of_kind),
                "smallest_move": min(moves) if moves else None,
            }
        )
    return lines


def _swapped(judge: Judge, prompt: Any, images: Sequence[Image.Image]) -> Iterator[Tensor]:
    """Meta's logits with another image in the place of each."""
    for place, image in enumerate(images):
        others = [*images]
        others[place] = noise(image.width, image.height, seed=100 + place)
        yield judge.logits(prompt, DECODED, others, seen_by_all(prompt, len(DECODED)))


def _compared(kind: str, logits: Tensor, expected: Tensor, moves: Sequence[Tensor], rows: slice) -> Compared:
    difference = (logits[rows] - expected[rows]).abs().max().item()
    moved = min(float(move[rows].max()) for move in moves) if moves else None
    return Compared(kind, len(logits[rows]), difference, moved)
