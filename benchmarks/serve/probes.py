"""Two questions to an idle server: what the service adds to a token, and what a repeated image saves."""

import random
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from benchmarks.serve.bare import BareModel
from benchmarks.serve.load import Ask, closed_loop
from benchmarks.serve.service import GrpcTarget
from benchmarks.serve.workload import Item, Kind, draw_picture

__all__ = ["added_latency", "repeated_images"]

_QUESTIONS = ("What is in the image?", "Which colour is the largest thing?")


async def added_latency(target: GrpcTarget, bare: BareModel, item: Item, rounds: int) -> dict[str, Any]:
    """Seconds per token through the service, at batch 1, beside the bare decode step of the same model.

    Service and bare model take turns, so that a change in the machine's speed meets both. gRPC, scheduling, sampling
    and detokenisation are in the difference.

    Args:
        target: of a server that does nothing else.
        bare: the same checkpoint, with as many threads.
        item: what is asked, over and over.
        rounds: turns of each.
    Returns:
        Medians over the rounds of the mean time from one token to the next and of the mean step, and their difference.
        Means, because several tokens may come in one message.
    """
    num_tokens = (await target.ask(item)).num_tokens  # also the first use of the image
    await bare.step_seconds(item, 4)
    served: list[float] = []
    steps: list[float] = []
    for _ in range(rounds):
        [exchange] = await closed_loop(target.ask, [item], 1)
        served.append(exchange.time_per_output_token)
        steps.append(fmean(await bare.step_seconds(item, num_tokens - 1)))
    service, step = median(served), median(steps)
    return {
        "rounds": rounds,
        "tokens_per_round": num_tokens,
        "service_seconds_per_token": round(service, 6),
        "bare_step_seconds": round(step, 6),
        "added_seconds_per_token": round(service - step, 6),
        "added_over_bare_step": round((service - step) / step, 4),
    }


async def repeated_images(
    ask: Ask, tile_size: int, kinds: Sequence[Kind], num_images: int, seed: int
) -> dict[str, Any]:
    """Time to first token of a new image and of another question on it, one request at a time.

    Args:
        ask: a server that does nothing else.
        tile_size: pixels along the side of the model's tiles.
        kinds: of images.
        num_images: of each kind.
        seed: of the images; the server must not have seen them.
    Returns:
        By kind: medians, and their ratio.
    """
    rng = random.Random(seed)
    found: dict[str, Any] = {}
    for kind in kinds:
        side = tile_size * (2 if kind == "four_tiles" else 1)
        pictures = [draw_picture(rng, side) for _ in range(num_images)]
        items = [
            Item(0, kind, question, (picture,), is_repeated)
            for picture in pictures
            for question, is_repeated in zip(_QUESTIONS, (False, True), strict=True)
        ]
        exchanges = [each for item in items for each in await closed_loop(ask, [item], 1)]
        first = median(each.time_to_first_token for each in exchanges if not each.item.is_repeated)
        repeated = median(each.time_to_first_token for each in exchanges if each.item.is_repeated)
        found[kind] = {
            "num_images": num_images,
            "first_seconds": round(first, 5),
            "repeated_seconds": round(repeated, 5),
            "repeated_over_first": round(repeated / first, 4),
        }
    return found
