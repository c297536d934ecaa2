"""What is asked: a question about an image of four tiles or of one, untrimmed or trimmed."""

import random
from dataclasses import dataclass

from benchmarks.serve.workload import draw_picture
from trimserve.api.info import ModelInfo
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Text
from trimserve.api.trim import TrimRequest

__all__ = ["QUESTION", "SETTINGS", "Setting", "make_prompt", "picture", "trim_params"]

QUESTION = "Describe what you see in a few words, and name every colour."


@dataclass(frozen=True, slots=True)
class Setting:
    """One request."""

    name: str
    side: int
    """Tiles along each side of the image."""
    is_trimmed: bool


SETTINGS = (Setting("off", 2, False), Setting("default", 2, True), Setting("one_tile", 1, True))


def picture(setting: Setting, tile_size: int) -> bytes:
    """The image, which fills its tiles."""
    return draw_picture(random.Random(0), setting.side * tile_size)


def make_prompt(setting: Setting, tile_size: int) -> ChatPrompt:
    """The question about the image."""
    return ChatPrompt((Message("user", (ImageFile(picture(setting, tile_size)), Text(QUESTION))),))


def trim_params(setting: Setting, info: ModelInfo, max_kept_fraction: float | None) -> TrimRequest:
    """How a setting is trimmed: as a request that names nothing, but for the cap."""
    if not setting.is_trimmed:
        return TrimRequest(enabled=False)
    return TrimRequest(
        k_ratio=info.default_k_ratio, merge_ratio=info.default_merge_ratio, max_kept_fraction=max_kept_fraction
    )
