"""A request that looks again: one pass finds the region that most heads vote for, a second one answers with it.

The model asks for nothing itself and is not trained for it. The region is cropped from the original pixels, encoded
like any image, and stands right behind the image, so that every row that sees the one sees the other. Both passes are
ordinary requests to the engine; it knows neither queue nor pages.

Source: Visual Perception Token, arXiv 2502.17425, region selection. Adapted: there the model is trained to write tokens
that name the region; here the query heads of the first cross-attention layer do, by the picks of `trimmed`. Left out:
its second kind of token, which asks for features of another encoder.
"""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import fields, replace
from math import ceil, isqrt

import numpy as np
from numpy.typing import NDArray

from trimserve.api.chunks import Finished, GenerationChunk, ImageSelection, StageSpan, Started, Timings
from trimserve.api.info import ModelInfo
from trimserve.api.prompt import ChatPrompt, CloserPrompt, ImageFile, Prompt, Region
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import LookAgain
from trimserve.errors import InvalidRequest
from trimserve.trimming.plan import TrimPlan
from trimserve.trimming.policies.table import POLICIES

__all__ = ["Generate", "in_passes", "most_voted"]

Generate = Callable[[GenerationRequest, float | None, float | None], AsyncGenerator[GenerationChunk, None]]
"""Chunks of a request with its deadline; the last one is when it came, if it goes on with one that was let in then."""

_FIELD = "trim.look_again"


def in_passes(
    generate: Generate, request: GenerationRequest, deadline: float | None, info: ModelInfo
) -> AsyncGenerator[GenerationChunk, None]:
    """Answer a request: in one pass, or in two if it looks again.

    Of two passes the times are those of both together, all else is the second's. The first is held until the second
    ends, so that what the request has taken stays taken.

    Args:
        generate: runs a pass.
        request: as it came.
        deadline: of all passes together.
        info: of the model.
    Raises:
        InvalidRequest: from iteration; it looks again and has not exactly one image, or its trimming keeps no votes.
    """
    if request.trim.look_again is None:
        return generate(request, deadline, None)
    return _in_two(generate, request, request.trim.look_again, deadline, info)


async def _in_two(
    generate: Generate, request: GenerationRequest, asked: LookAgain, deadline: float | None, info: ModelInfo
) -> AsyncGenerator[GenerationChunk, None]:
    _check(request, info)
    came_at = time.monotonic()
    async with aclosing(generate(_glance(request), deadline, None)) as first:
        started, finished = await _result(first)
        region = most_voted(started.selections[0], info.patch_size, asked.side_ratio)
        closer, ended_at = _closer(request, region), time.monotonic()
        del request  # a frame that waits for the answer keeps no images
        second = generate(closer, deadline, came_at)
        del closer
        async with aclosing(second) as chunks:
            async for chunk in chunks:
                match chunk:
                    case Started():
                        spans = _joined(started.spans, chunk.spans, ended_at)
                        yield replace(chunk, spans=spans, looked_at=region)
                    case Finished():
                        yield replace(chunk, timings=_added(finished.timings, chunk.timings))
                    case _:
                        yield chunk


def most_voted(selection: ImageSelection, patch_size: int, side_ratio: float) -> Region:
    """The region in which the kept patches have most votes, a vote being a head's pick.

    Of all places on the patch grid it is the one with most votes, ties to the upper and left one, then moved as far as
    the image allows to have the mean place of its votes in its middle.

    Args:
        selection: what was kept, with the picks of at least one head.
        patch_size: pixels of the tile canvas along a patch's side.
        side_ratio: height and width of the region, as shares of the image's.
    """
    votes = _votes(selection)
    high, wide = selection.content_height / patch_size, selection.content_width / patch_size  # in patches
    votes = votes[: ceil(high), : ceil(wide)]
    rows, columns = max(1, round(side_ratio * high)), max(1, round(side_ratio * wide))
    sums = np.pad(votes.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    in_window = sums[rows:, columns:] - sums[:-rows, columns:] - sums[rows:, :-columns] + sums[:-rows, :-columns]
    top, left = np.unravel_index(in_window.argmax(), in_window.shape)
    window = votes[top : top + rows, left : left + columns]
    return Region(
        _begin(window.sum(axis=1), int(top), high, side_ratio),
        _begin(window.sum(axis=0), int(left), wide, side_ratio),
        side_ratio,
        side_ratio,
    )


def _check(request: GenerationRequest, info: ModelInfo) -> None:
    num_images = _num_images(request.prompt)
    if num_images != 1:
        raise InvalidRequest(_FIELD, f"needs a prompt with exactly 1 image, got {num_images}")
    if info.max_images < 2:
        raise InvalidRequest(_FIELD, "needs a server that takes 2 images in a request (--max-images)")
    policy = TrimPlan.of(request.trim).policy
    if policy is None:
        raise InvalidRequest(_FIELD, "needs trimming that can drop something, or no head would vote")
    if not policy.has_votes:
        known = ", ".join(name for name, each in POLICIES.items() if each.has_votes)
        raise InvalidRequest(_FIELD, f"needs a policy whose heads vote ({known}), got {policy.name!r}")


def _num_images(prompt: Prompt) -> int:
    assert not isinstance(prompt, CloserPrompt), "a client cannot send one"
    if isinstance(prompt, ChatPrompt):
        return sum(isinstance(part, ImageFile) for message in prompt.messages for part in message.parts)
    return len(prompt.images)


def _glance(request: GenerationRequest) -> GenerationRequest:
    """The first pass: one token, which nobody sees, and what was kept; a constraint is refused before it, not after."""
    trim = replace(request.trim, return_selection=True)
    return replace(request, sampling=SamplingParams(max_new_tokens=1), trim=trim, num_choices=1)


def _closer(request: GenerationRequest, region: Region) -> GenerationRequest:
    assert not isinstance(request.prompt, CloserPrompt)
    return replace(request, prompt=CloserPrompt(request.prompt, region), trim=replace(request.trim, look_again=None))


async def _result(chunks: AsyncGenerator[GenerationChunk, None]) -> tuple[Started, Finished]:
    """First and last chunk of an answer; the generator is not exhausted."""
    started = None
    async for chunk in chunks:
        match chunk:
            case Started():
                started = chunk
            case Finished():
                assert started is not None
                return started, chunk
    raise AssertionError("an answer that raises nothing has a last chunk")


def _votes(selection: ImageSelection) -> NDArray[np.int64]:
    """[rows, columns] of the patches of all tiles: how many heads picked each one that was kept."""
    size = selection.features_per_tile
    side, grid = isqrt(size - 1), (selection.tiles_high, selection.tiles_wide)
    bitmaps = np.frombuffer(b"".join((selection.kept, *selection.picks_by_head)), np.uint8)
    bits = np.unpackbits(bitmaps.reshape(1 + len(selection.picks_by_head), -1), axis=1, bitorder="little")
    is_kept, *picks = bits[:, : grid[0] * grid[1] * size]
    votes: NDArray[np.int64] = np.sum(picks, axis=0, dtype=np.int64) * is_kept
    patches = votes.reshape(*grid, size)[..., 1:].reshape(*grid, side, side)  # without class tokens
    return patches.swapaxes(1, 2).reshape(grid[0] * side, grid[1] * side)


def _begin(votes: NDArray[np.int64], begin: int, num_patches: float, share: float) -> float:
    """Where a stretch begins along one side, as a share of it.

    Args:
        votes: of each row or column in the window.
        begin: of the window, in patches.
        num_patches: along the side.
        share: of the side that the stretch takes.
    """
    places = begin + np.arange(len(votes)) + 0.5
    middle = float(votes @ places / votes.sum()) if votes.any() else num_patches / 2
    return min(max(middle / num_patches - share / 2, 0.0), 1 - share)


def _joined(first: tuple[StageSpan, ...], second: tuple[StageSpan, ...], ended_at: float) -> tuple[StageSpan, ...]:
    """Stages of both passes; the second waits only from the end of the first on."""
    return (*first, *(replace(span, begin=max(span.begin, ended_at)) for span in second))


def _added(first: Timings, second: Timings) -> Timings:
    """Of both passes; the second counts from when the request came, and so its queue has the first in it."""
    sums = {each.name: getattr(first, each.name) + getattr(second, each.name) for each in fields(Timings)}
    whole = {name: getattr(second, name) for name in ("time_to_first_token_seconds", "total_seconds")}
    return Timings(**sums | whole | {"queue_seconds": second.queue_seconds - first.total_seconds + first.queue_seconds})
