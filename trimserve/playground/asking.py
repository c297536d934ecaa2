"""Asks the server, and tells what changes on the page with each message of the answer."""

from collections.abc import Iterator
from dataclasses import dataclass

import grpc
from PIL.Image import Image

from trimserve.client import Client
from trimserve.explain import draw_kept, draw_votes, selection_of
from trimserve.playground.account import account_table, images_table
from trimserve.refusal import Refusal
from trimserve.v1 import generation_pb2 as pb

__all__ = ["Seen", "ask"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What there is to see of an answer so far; None has not changed."""

    text: str
    kept: Image | None = None
    """The image, lit where it was kept."""
    votes: Image | None = None
    """The image under the heat of the heads' votes."""
    account: str | None = None
    """Tables, as Markdown."""
    is_refused: bool = False
    """Whether `text` is why there is no answer."""


def ask(client: Client, request: pb.GenerateRequest, image: Image | None, tile_size: int) -> Iterator[Seen]:
    """Stream an answer; closing the iterator cancels it.

    Args:
        client: connected.
        request: asks for the kept set.
        image: that the request shows, upright RGB.
        tile_size: of the served model, in pixels.
    """
    text = ""
    try:
        for event in client.stream(request):
            match event.WhichOneof("event"):
                case "started":
                    yield _seen_started(event.started, image, tile_size)
                case "delta":
                    text += event.delta.text
                    yield Seen(text)
                case "finished":
                    yield Seen(text, account=account_table(event.finished))
    except grpc.RpcError as error:
        refusal = Refusal.of(error)
        yield Seen(f"{refusal.code}: {refusal.message}", is_refused=True)


def _seen_started(started: pb.Started, image: Image | None, tile_size: int) -> Seen:
    if image is None or not started.selections:
        return Seen("", account=images_table(started.images))
    selection = selection_of(started.selections[0])
    return Seen(
        "",
        kept=draw_kept(image, selection, tile_size=tile_size),
        votes=draw_votes(image, selection, tile_size=tile_size),
        account=images_table(started.images),
    )
