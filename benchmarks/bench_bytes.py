"""Counts bytes of keys and values: what a request holds, and how many requests the same bytes hold.

    python -m benchmarks.bench_bytes [--bench-model DIR] [--out FILE] [--quick]

Requests with a 4-tile image, a 1-tile image, two 4-tile images and text alone, trimmed and untrimmed. trimserve's bytes
come from the account of a running server, transformers' from the tensors of its cache. SGLang's are computed from its
layout: an image takes the slots of a full canvas, padding tiles among them, and a slot spans all layers, self- and
cross-attention alike. The figures are bytes, not times, so the machine need not be quiet.
"""

import asyncio
import random
import sys
from collections.abc import Sequence
from typing import Any, Final

from benchmarks.models import MODELS, UnderTest, under_test
from benchmarks.report import finish, markdown, options, origin, size
from benchmarks.rival import CacheBytes, Transformers
from benchmarks.service import GrpcTarget, Held, running_server
from benchmarks.workload import Item, Kind, picture_of
from trimserve.api.info import ModelInfo
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.memory import prefill_scratch_bytes
from trimserve.model.loading import load_model
from trimserve.v1 import generation_pb2 as pb

__all__ = ["headline", "main", "saving", "sglang_bytes", "table"]

_CASES: Final[dict[str, tuple[Kind, ...]]] = {
    "four_tiles": ("four_tiles",),
    "one_tile": ("one_tile",),
    "two_images": ("four_tiles", "four_tiles"),
    "text": (),
}
"""The images of each request."""

_NAMES: Final = {"four_tiles": "4 tiles", "one_tile": "1 tile", "two_images": "2 images of 4 tiles", "text": "text"}
_LAYOUTS: Final = {
    "trimserve": "trimserve",
    "trimserve_untrimmed": "trimserve, untrimmed",
    "transformers": "transformers",
    "sglang_layout": "SGLang's layout",
}
_OURS: Final = {"trimserve": True, "trimserve_untrimmed": False}
_COUNTED: Final = ("four_tiles", "one_tile")
_QUESTION: Final = "What is in the image? Answer in one sentence and name every colour."
_PEERS_AT_ONCE: Final = 8
"""Requests are counted in the bytes that so many requests with a 4-tile image take in transformers' caches."""
_ALL_AT_ONCE_SECONDS: Final = 3600
"""A slice of prefill so long that whatever fits is in before the first decode step."""


class _Account:
    """Measures one model."""

    def __init__(self, model: UnderTest, max_new_tokens: int, num_threads: int) -> None:
        self._model, self._max_new_tokens, self._num_threads = model, max_new_tokens, num_threads
        self._limits = EngineConfig(max_images=max(map(len, _CASES.values())))
        name = None if model.folder is None else str(model.folder)
        self._info: ModelInfo = load_model(ModelConfig(model=name), self._limits).info
        self._items = {name: _item(name, self._info.tile_size) for name in _CASES}

    async def run(self) -> dict[str, Any]:
        """Everything, as plain data; all figures are bytes or counts."""
        requests = await self._requests()
        kv_bytes = _PEERS_AT_ONCE * requests["four_tiles"]["bytes"]["transformers"]["total"]
        at_once = {name: await self._at_once(name, requests[name]["bytes"], kv_bytes) for name in _COUNTED}
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
            "at_once": {"kv_bytes": kv_bytes, **at_once},
        }

    async def _requests(self) -> dict[str, Any]:
        with Transformers(
            self._model.checkpoint, num_threads=self._num_threads, max_new_tokens=self._max_new_tokens
        ) as rival:
            caches = {name: await rival.cache_bytes(item) for name, item in self._items.items()}
        held: dict[str, dict[str, Held]] = {}
        flags = ("--max-images", str(self._limits.max_images))
        with running_server(self._model.folder, num_threads=self._num_threads, flags=flags) as server:
            for layout, is_trimmed in _OURS.items():
                async with self._target(server.address, is_trimmed=is_trimmed) as target:
                    held[layout] = {name: await target.held(item) for name, item in self._items.items()}
        return {name: self._request(name, held, caches[name]) for name in _CASES}

    def _request(self, name: str, held: dict[str, dict[str, Held]], cache: CacheBytes) -> dict[str, Any]:
        trimmed = held["trimserve"][name]
        num_positions = trimmed.num_prompt_tokens + self._max_new_tokens
        by_layout = {layout: _bytes(of[name].self_bytes, of[name].cross_bytes) for layout, of in held.items()}
        by_layout["transformers"] = _bytes(cache.self_attention, cache.cross)
        by_layout["sglang_layout"] = sglang_bytes(self._info, len(_CASES[name]), num_positions)
        return {
            "num_prompt_tokens": trimmed.num_prompt_tokens,
            "features": _features(trimmed.images),
            "bytes": by_layout,
            "cross_bytes_over_transformers": round(trimmed.cross_bytes / cache.cross, 4) if cache.cross else None,
        }

    async def _at_once(self, name: str, of_one: dict[str, dict[str, int]], kv_bytes: int) -> dict[str, int]:
        found = {layout: kv_bytes // of_one[layout]["total"] for layout in ("transformers", "sglang_layout")}
        for layout, is_trimmed in _OURS.items():
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
        return GrpcTarget(address, max_new_tokens=self._max_new_tokens, trim=self._model.trim(is_on=is_trimmed))


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
    kinds = ("padding", "valid", "kept", "merged")
    return {name: sum(getattr(image, f"{name}_features") for image in images) for name in kinds}


def _item(name: str, tile_size: int) -> Item:
    rng, kinds = random.Random(name), _CASES[name]
    return Item(0, next(iter(kinds), "text"), _QUESTION, tuple(picture_of(kind, rng, tile_size) for kind in kinds))


def table(report: dict[str, Any]) -> str:
    """Bytes of one request by layout, and requests at once in equal bytes, as Markdown."""
    return "\n\n".join([*(_table_of_model(model) for model in report["models"]), origin(report)])


def _table_of_model(model: dict[str, Any]) -> str:
    cap = f", at most {model['max_kept_fraction']:.0%} of the features kept" if model["max_kept_fraction"] else ""
    title = f"**{model['model']}** ({model['dtype']}, k_ratio {model['k_ratio']:g}{cap})"
    rows = []
    for name, request in model["requests"].items():
        features, ratio = request["features"], request["cross_bytes_over_transformers"]
        sizes = [size(request["bytes"][layout]["total"]) for layout in _LAYOUTS]
        held = features["kept"] + features["merged"]
        rows.append([_NAMES[name], features["valid"], held, *sizes, "" if ratio is None else f"{ratio:.3f}"])
    at_once = model["at_once"]
    counts = [[_NAMES[name], *(of[layout] for layout in _LAYOUTS)] for name, of in at_once.items() if name in _NAMES]
    parts = [
        f"{title}, answers of {model['max_new_tokens']} tokens; one request holds:",
        markdown(["request", "features", "held", *_LAYOUTS.values(), "cross KV over transformers'"], rows),
        f"Requests that run at once in {size(at_once['kv_bytes'])} of KV:",
        markdown(["request", *_LAYOUTS.values()], counts),
    ]
    return "\n\n".join(parts)


def headline(of_bytes: dict[str, Any], of_trimming: dict[str, Any]) -> str:
    """What trimming saves and costs, in a few lines of Markdown.

    Args:
        of_bytes: the report.
        of_trimming: report of `trimserve eval` on the embedded model, of the budgets that it recommends, among others.
    """
    model, row, before = _exact_answers(of_bytes, of_trimming)
    at_once = model["at_once"]["four_tiles"]
    held = f"{_held(model, 'four_tiles'):.0%} for 4 tiles, {_held(model, 'one_tile'):.0%} for 1 tile"
    counts = f"untrimmed {at_once['trimserve_untrimmed']}, transformers {at_once['transformers']}"
    right = f"{row['accuracy']['value']:.1%}, untrimmed {before:.1%}"
    return "\n".join(
        [
            "| saved and paid, embedded model | |\n|---|---|",
            f"| cross-attention KV of an image, beside transformers' | {held} |",
            f"| requests with a 4-tile image at once, in equal memory | {at_once['trimserve']}, {counts} |",
            f"| exact answers to {row['num_questions']:,} held-out questions | {right} |",
        ]
    )


def saving(of_bytes: dict[str, Any], of_trimming: dict[str, Any]) -> str:
    """The same in one sentence; takes what `headline` takes."""
    model, row, before = _exact_answers(of_bytes, of_trimming)
    return (
        f"An image of four tiles holds **{_held(model, 'four_tiles'):.0%}** of the cross-attention KV that it holds in "
        f"transformers, and **{row['accuracy']['value']:.1%}** of {row['num_questions']:,} held-out questions are "
        f"answered exactly; untrimmed, {before:.1%} are (embedded model)."
    )


def _held(model: dict[str, Any], request: str) -> float:
    """Cross-attention KV of a request, as a share of what transformers holds for it."""
    held = model["requests"][request]["bytes"]
    return float(held["trimserve"]["cross"] / held["transformers"]["cross"])


def _exact_answers(
    of_bytes: dict[str, Any], of_trimming: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], float]:
    """The embedded model, the evaluation's row of its own setting, and the accuracy without trimming."""
    [model] = [model for model in of_bytes["models"] if model["model"] == "embedded"]
    setting = {"policy": "trimmed", "k_ratio": model["k_ratio"], "merge_ratio": model["merge_ratio"], "kind": "all"}
    [row] = [row for row in of_trimming["rows"] if setting.items() <= row.items()]
    return model, row, row["accuracy"]["value"] - row["accuracy_change"]["value"]


def main() -> None:
    """Command line."""
    parser = options(__doc__, "bytes.json", threads=True, bench_model=True, quick=True)
    arguments = parser.parse_args()
    names, tokens = (MODELS[:1], 32) if arguments.quick else (MODELS, 128)
    models = []
    for name in names:
        print(name, file=sys.stderr, flush=True)
        account = _Account(under_test(name, arguments.bench_model), tokens, arguments.threads)
        models.append(asyncio.run(account.run()))
    finish("bytes", arguments.out, {"models": models}, arguments.threads)


if __name__ == "__main__":
    main()
