"""What the soak asks: questions of every kind, some of which are to be cancelled, and some that nobody can answer."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from benchmarks.load import draw_picture
from trimserve.client import make_request
from trimserve.v1 import generation_pb2 as pb

__all__ = ["Ask", "Asks", "Fate", "Shares"]

_QUESTIONS: Final = (
    "What is in the image?",
    "Describe what you see in a few words.",
    "How many shapes are there, and where are they?",
    "Answer in one sentence, name every colour, and begin with the thing that is closest to the middle.",
)
_MIN_NEW_TOKENS: Final = 4
_MAX_NEW_TOKENS: Final = 96
_MAX_WAIT_SECONDS: Final = 2.0
_REMEMBERED: Final = 8
"""Images that later questions may show again."""


class Fate(Enum):
    """How a request is to end."""

    ANSWERED = "answered"
    CANCELLED = "cancelled"
    """By its client, at any time; it may have been answered before."""
    REFUSED = "refused"
    """With INVALID_ARGUMENT."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    request: pb.GenerateRequest
    kind: str
    """Such as `one image, untrimmed, streamed`."""
    is_streamed: bool
    fate: Fate
    patience: float = 1.0
    """Of a client that cancels: the share of the answer's messages, or of two seconds, that it waits for."""

    @property
    def num_messages(self) -> int:
        """Messages of a stream that a client reads before it cancels."""
        return int(self.patience * self.request.sampling.max_new_tokens)

    @property
    def wait_seconds(self) -> float:
        """How long a client waits for a unary answer before it cancels."""
        return self.patience * _MAX_WAIT_SECONDS


@dataclass(frozen=True, slots=True)
class Shares:
    """Of all requests, each in [0, 1]."""

    cancelled: float = 0.1
    refused: float = 0.05
    """Bad input."""
    repeated: float = 0.5
    """Of the images: those that were shown before."""
    streamed: float = 0.5
    """The others are unary."""


class Asks:
    """Draws requests, the same for equal seeds."""

    def __init__(self, tile_size: int, shares: Shares, seed: int) -> None:
        """Remember no image yet.

        Args:
            tile_size: pixels along the side of the model's tiles.
            shares: of what is not plainly answered.
            seed: of everything.
        """
        self._tile_size = tile_size
        self._shares = shares
        self._rng = random.Random(seed)
        self._shown: list[bytes] = []

    def draw(self) -> Ask:
        """The next request."""
        rng, shares = self._rng, self._shares
        fate = rng.random()
        if fate < shares.refused:
            name, make = rng.choice(list(_BAD.items()))
            return Ask(make(self._image()), f"bad input: {name}", rng.random() < shares.streamed, Fate.REFUSED)
        request, kind = self._good()
        is_streamed = rng.random() < shares.streamed
        kind += ", streamed" if is_streamed else ", unary"
        if fate < shares.refused + shares.cancelled:
            return Ask(request, kind, is_streamed, Fate.CANCELLED, rng.random())
        return Ask(request, kind, is_streamed, Fate.ANSWERED)

    def _good(self) -> tuple[pb.GenerateRequest, str]:
        rng = self._rng
        num_images = rng.choice((0, 1, 1, rng.randint(2, 3)))
        is_trimmed = rng.random() < 0.5
        # End tokens are ignored, so that it is known how many tokens are to come.
        sampling = pb.SamplingParams(
            max_new_tokens=rng.randint(_MIN_NEW_TOKENS, _MAX_NEW_TOKENS),
            ignore_eos=True,
            temperature=rng.choice((0.0, 1.0)),
        )
        trim = pb.TrimOptions(mode=pb.TRIM_MODE_ON if is_trimmed else pb.TRIM_MODE_OFF)
        images = [self._image() for _ in range(num_images)]
        question = " ".join(rng.choices(_QUESTIONS, k=rng.randint(1, 4)))
        shown = ("text", "one image", "several images")[min(num_images, 2)]
        kind = f"{shown}, {'trimmed' if is_trimmed else 'untrimmed'}"
        return make_request(question, images, sampling=sampling, trim=trim), kind

    def _image(self) -> bytes:
        rng = self._rng
        if self._shown and rng.random() < self._shares.repeated:
            return rng.choice(self._shown)
        image = draw_picture(rng, self._tile_size * rng.randint(1, 2))
        self._shown = [*self._shown[-_REMEMBERED + 1 :], image]
        return image


def _with_image(data: bytes) -> pb.GenerateRequest:
    return make_request(_QUESTIONS[0], [data])


_BAD: Final[dict[str, Callable[[bytes], pb.GenerateRequest]]] = {
    "not an image": lambda image: _with_image(image[::-1]),
    "a truncated image": lambda image: _with_image(image[: len(image) // 2]),
    "an image without its token": lambda image: pb.GenerateRequest(raw_prompt="x", images=[pb.Image(data=image)]),
    "an image token without image": lambda _: pb.GenerateRequest(raw_prompt="<|image|>x"),
    "past the context": lambda image: make_request("x", [image], sampling=pb.SamplingParams(max_new_tokens=1_000_000)),
    "no prompt": lambda _: pb.GenerateRequest(chat=pb.Chat()),
    "k_ratio NaN": lambda image: make_request("x", [image], trim=pb.TrimOptions(k_ratio=float("nan"))),
}
