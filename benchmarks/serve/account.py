"""Bytes of keys and values that one request holds, in several layouts, and how many requests the same bytes hold.

trimserve's bytes come from the account of a running server, transformers' from the tensors of its cache. SGLang's are
computed from its layout: an image takes the slots of a full canvas, padding tiles among them, and a slot spans all
layers, self- and cross-attention alike.
"""

import random
from collections.abc import Sequence
from typing import Any, Final

from benchmarks.serve.models import UnderTest
from benchmarks.serve.rivals import CacheBytes, Transformers
from benchmarks.serve.service import GrpcTarget, Held, running_server
from benchmarks.serve.workload import Item, Kind, draw_picture
from trimserve.api.info import ModelInfo
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.memory import prefill_scratch_bytes
from trimserve.model.loading import load_model
from trimserve.v1 import generation_pb2 as pb

__all__ = ["CASES", "Account", "sglang_bytes"]

CASES: Final[dict[str, tuple[Kind, ...]]] = {
    "four_tiles": ("four_tiles",),
    "one_tile": ("one_tile",),
    "two_images": ("four_tiles", "four_tiles"),
    "text": (),
}
"""The images of each request."""

_COUNTED: Final = ("four_tiles", "one_tile")
_QUESTION: Final = "What is in the image? Answer in one sentence and name every colour."
_LAYOUTS: Final = {"trimserve": True, "trimserve_untrimmed": False}
_ALL_AT_ONCE_SECONDS: Final = 3600
"""A slice of prefill so long that whatever fits is in before the first decode step."""


class Account:
    """Measures one model."""

    def __init__(self, model: UnderTest, *, max_new_tokens: int, peers_at_once: int, num_threads: int) -> None:
        """Load the model's description.

        Args:
            model: which.
            max_new_tokens: of every answer; text positions are held for all of them at its end.
            peers_at_once: the bytes in which requests are counted are what as many requests with a 4-tile image take
                in transformers' caches.
            num_threads: of one op.
        """
        self._model = model
        self._max_new_tokens = max_new_tokens
        self._peers_at_once = peers_at_once
        self._num_threads = num_threads
        name = None if model.folder is None else str(model.folder)
        self._limits = EngineConfig(max_images=max(len(kinds) for kinds in CASES.values()))
        self._info: ModelInfo = load_model(ModelConfig(model=name), self._limits).info
        self._items = {name: _item(name, self._info.tile_size) for name in CASES}

    async def run(self) -> dict[str, Any]:
        """Everything, as plain data; all figures are bytes or counts."""
        requests = await self._requests()
        kv_bytes = self._peers_at_once * requests["four_tiles"]["bytes"]["transformers"]["total"]
        info = self._info
        return {
            "model": self._model.name,
            "dtype": info.dtype,
            "k_ratio": info.default_k_ratio,
            "merge_ratio": info.default_merge_ratio,
            "max_kept_fraction": self._model.max_kept_fraction,
            "max_new_tokens": self._max_new_tokens,
            "prefill_scratch_bytes": prefill_scratch_bytes(info),
            "requests": requests,
            "at_once": {
                "kv_bytes": kv_bytes,
                **{name: await self._at_once(name, requests[name]["bytes"], kv_bytes) for name in _COUNTED},
            },
        }

    async def _requests(self) -> dict[str, Any]:
        caches = await self._caches()
        held: dict[str, dict[str, Held]] = {}
        flags = ("--max-images", str(self._limits.max_images))
        with running_server(self._model.folder, num_threads=self._num_threads, flags=flags) as server:
            for layout, is_trimmed in _LAYOUTS.items():
                async with self._target(server.address, is_trimmed=is_trimmed) as target:
                    held[layout] = {name: await target.held(item) for name, item in self._items.items()}
        return {name: self._request(name, held, caches[name]) for name in CASES}

    async def _caches(self) -> dict[str, CacheBytes]:
        options = {"num_threads": self._num_threads, "max_new_tokens": self._max_new_tokens}
        with Transformers(self._model.checkpoint, **options) as rival:
            return {name: await rival.cache_bytes(item) for name, item in self._items.items()}

    def _request(self, name: str, held: dict[str, dict[str, Held]], cache: CacheBytes) -> dict[str, Any]:
        trimmed = held["trimserve"][name]
        num_positions = trimmed.num_prompt_tokens + self._max_new_tokens
        by_layout = {layout: _bytes(of[name].self_bytes, of[name].cross_bytes) for layout, of in held.items()}
        by_layout["transformers"] = _bytes(cache.self, cache.cross)
        by_layout["sglang_layout"] = sglang_bytes(self._info, len(CASES[name]), num_positions)
        features = _features(trimmed.images)
        return {
            "num_prompt_tokens": trimmed.num_prompt_tokens,
            "features": features,
            "bytes": by_layout,
            "cross_bytes_over_transformers": _ratio(trimmed.cross_bytes, cache.cross),
            "features_over_transformers": _ratio(
                features["kept"] + features["merged"], features["padding"] + features["valid"]
            ),
        }

    async def _at_once(self, name: str, of_one: dict[str, dict[str, int]], kv_bytes: int) -> dict[str, int]:
        found = {layout: kv_bytes // of_one[layout]["total"] for layout in ("transformers", "sglang_layout")}
        for layout, is_trimmed in _LAYOUTS.items():
            most = 2 * (kv_bytes // of_one[layout]["total"]) + 2  # half an answer takes no less than half of the pages
            flags = {
                "--kv-cache-bytes": kv_bytes + prefill_scratch_bytes(self._info),
                "--max-images": self._limits.max_images,
                "--max-batch": most,
                "--prefill-slice-seconds": _ALL_AT_ONCE_SECONDS,
            }
            words = [str(word) for flag in flags.items() for word in flag]
            with running_server(self._model.folder, num_threads=self._num_threads, flags=words) as server:
                async with self._target(server.address, is_trimmed=is_trimmed) as target:
                    found[layout] = await target.num_at_once(self._items[name], most)
        return found

    def _target(self, address: str, *, is_trimmed: bool) -> GrpcTarget:
        trim = self._model.trim(is_on=is_trimmed)
        return GrpcTarget(address, max_new_tokens=self._max_new_tokens, trim=trim)


def sglang_bytes(info: ModelInfo, num_images: int, num_positions: int) -> dict[str, int]:
    """What SGLang 0.5.23 holds of a request, by its layout: one slot of every layer for each token and each feature.

    Args:
        info: of the model.
        num_images: each takes the features of a full canvas, whatever its size.
        num_positions: tokens of prompt and answer.
    Returns:
        Bytes: `cross`, of features; `self`, of text; and `total`.
    """
    slot = (info.num_self_attention_layers + info.num_cross_attention_layers) * info.kv_bytes_per_position
    return _bytes(num_positions * slot, num_images * info.max_tiles * info.features_per_tile * slot)


def _bytes(of_self: int, cross: int) -> dict[str, int]:
    return {"self": of_self, "cross": cross, "total": of_self + cross}


def _features(images: Sequence[pb.ImageUsage]) -> dict[str, int]:
    return {
        name: sum(getattr(image, f"{name}_features") for image in images)
        for name in ("padding", "valid", "kept", "merged")
    }


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _item(name: str, tile_size: int) -> Item:
    rng = random.Random(name)
    pictures = [draw_picture(rng, tile_size * (2 if kind == "four_tiles" else 1)) for kind in CASES[name]]
    kind: Kind = CASES[name][0] if pictures else "text"
    return Item(0, kind, _QUESTION, tuple(pictures), is_repeated=False)
