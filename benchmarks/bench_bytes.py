"""Counts bytes of keys and values: what a request holds, and how many requests the same bytes hold.

    python -m benchmarks.bench_bytes [--bench-model DIR] [--out FILE] [--quick]

Requests with a 4-tile image, a 1-tile image, two 4-tile images and text alone, trimmed and untrimmed. trimserve's bytes
come from the account of a running server, transformers' from the tensors of its cache. SGLang's are computed from its
layout: an image takes the slots of a full canvas, padding tiles among them, and a slot spans all layers, self- and
cross-attention alike. The figures are bytes, not times, so the machine need not be quiet.
"""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, Final

from benchmarks.load import Item, Kind, picture_of
from benchmarks.models import BENCH_MODEL, MODELS, UnderTest, under_test
from benchmarks.report import command_line, finish, markdown, noted, origin
from benchmarks.rival import CacheBytes, Transformers
from benchmarks.service import request_of, running_server
from trimserve.api.info import ModelInfo
from trimserve.client import Client
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.memory import prefill_scratch_bytes
from trimserve.model.loading import describe_model
from trimserve.v1 import generation_pb2 as pb

__all__ = ["main", "sglang_bytes", "table"]

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
_MAX_IMAGES: Final = max(map(len, _CASES.values()))
_PEERS_AT_ONCE: Final = 8
"""Requests are counted in the bytes that so many requests with a 4-tile image take in transformers' caches."""
_ALL_AT_ONCE_SECONDS: Final = 3600
"""A slice of prefill so long that whatever fits is in before the first decode step."""
_MORE_TOKENS: Final = 64
"""Beyond those that are asked for, so that a request still runs when its account is asked for."""


class _Account:
    """What is known of one model; all figures are bytes or counts."""

    def __init__(self, model: UnderTest, max_new_tokens: int, num_threads: int) -> None:
        self._model = model
        self._options = {"num_threads": num_threads, "max_new_tokens": max_new_tokens}
        self._info = describe_model(ModelConfig(model=str(model.checkpoint)), EngineConfig(max_images=_MAX_IMAGES))
        self._items = {name: _item(name, self._info.tile_size) for name in _CASES}

    def run(self) -> dict[str, Any]:
        """Everything, as plain data."""
        info, requests = self._info, self._requests()
        kv_bytes = _PEERS_AT_ONCE * requests["four_tiles"]["bytes"]["transformers"]["total"]
        return {
            "model": self._model.name,
            "dtype": info.dtype,
            "k_ratio": info.default_k_ratio,
            "merge_ratio": info.default_merge_ratio,
            "max_kept_fraction": self._model.max_kept_fraction,
            "max_new_tokens": self._options["max_new_tokens"],
            "prefill_scratch_bytes": prefill_scratch_bytes(info),
            "requests": requests,
            "at_once": {
                "kv_bytes": kv_bytes,
                **{name: self._at_once(name, requests[name]["bytes"], kv_bytes) for name in _COUNTED},
            },
        }

    def _requests(self) -> dict[str, Any]:
        found: dict[str, Any] = {name: {"bytes": {}} for name in self._items}
        with Transformers(self._model.checkpoint, **self._options) as rival:
            caches = {name: rival.cache_bytes(item) for name, item in self._items.items()}
        for layout in _OURS:
            with self._serving() as client:
                for name in self._items:
                    request = self._request(name, layout, _MORE_TOKENS)
                    found[name]["bytes"][layout], started = _held(client, request)
                    if layout == "trimserve":
                        found[name] |= _features(started, caches[name], found[name]["bytes"][layout])
        for name, figures in found.items():
            num_positions = figures["num_prompt_tokens"] + self._options["max_new_tokens"]
            figures["bytes"]["transformers"] = _bytes(caches[name].self_attention, caches[name].cross)
            figures["bytes"]["sglang_layout"] = sglang_bytes(self._info, len(_CASES[name]), num_positions)
        return found

    def _at_once(self, name: str, of_one: dict[str, dict[str, int]], kv_bytes: int) -> dict[str, int]:
        found = {layout: kv_bytes // of_one[layout]["total"] for layout in ("transformers", "sglang_layout")}
        pool = kv_bytes + prefill_scratch_bytes(self._info)
        for layout in _OURS:
            most = 2 * (kv_bytes // of_one[layout]["total"]) + 2  # half an answer takes no less than half of the pages
            flags = ("--kv-cache-bytes", pool, "--max-batch", most, "--prefill-slice-seconds", _ALL_AT_ONCE_SECONDS)
            with self._serving(*flags) as client:
                found[layout] = _num_at_once(client, self._request(name, layout), most)
        return found

    @contextmanager
    def _serving(self, *flags: object) -> Iterator[Client]:
        num_threads, flags = self._options["num_threads"], ("--max-images", _MAX_IMAGES, *flags)
        server = running_server(self._model.checkpoint, num_threads=num_threads, flags=flags)
        with server as process, Client(process.address) as client:
            yield client

    def _request(self, name: str, layout: str, more_tokens: int = 0) -> pb.GenerateRequest:
        tokens = self._options["max_new_tokens"] + more_tokens
        return request_of(self._items[name], tokens, self._model.trim(is_on=_OURS[layout]))


def _held(client: Client, request: pb.GenerateRequest) -> tuple[dict[str, int], pb.Started]:
    """What a request holds by the server's account shortly before its end; the server has nothing else to do."""
    num_tokens, started, stream = 0, pb.Started(), client.stream(request)
    for event in stream:
        num_tokens += len(event.delta.token_ids)
        if event.HasField("started"):
            started = event.started
        elif num_tokens >= request.sampling.max_new_tokens - _MORE_TOKENS:
            break
    status = client.status()  # while the stream, which ends with this function, is still open
    assert status.num_running == 1, f"{status.num_running} requests run, one was asked about"
    return _bytes(status.self_kv_bytes, status.cross_kv_bytes), started


def _num_at_once(client: Client, request: pb.GenerateRequest, num_clients: int) -> int:
    """How many of equal requests run at the same time; there are more clients than can."""

    def ask() -> int:
        """Go on until half of the answer is there, when whatever fits has come in, then look how many run."""
        num_tokens, stream = 0, client.stream(request)
        while num_tokens <= request.sampling.max_new_tokens // 2:
            num_tokens += len(next(stream).delta.token_ids)
        status = client.status()
        assert status.num_waiting, f"{num_clients} clients are too few to fill the pool"
        return status.num_running

    with ThreadPoolExecutor(num_clients) as clients:
        answers = [clients.submit(ask) for _ in range(num_clients)]
        first = next(as_completed(answers))
        client.close()  # the others need not go on
    return first.result()


def _features(started: pb.Started, cache: CacheBytes, held: dict[str, int]) -> dict[str, Any]:
    kinds = ("padding", "valid", "kept", "merged")
    return {
        "num_prompt_tokens": started.num_prompt_tokens,
        "features": {name: sum(getattr(image, f"{name}_features") for image in started.images) for name in kinds},
        "cross_bytes_over_transformers": round(held["cross"] / cache.cross, 4) if cache.cross else None,
    }


def sglang_bytes(info: ModelInfo, num_images: int, num_positions: int) -> dict[str, int]:
    """What SGLang 0.5.23 holds of a request, by its layout: one slot of every layer for each token and each feature.

    An image takes the features of a full canvas, whatever its size; positions are tokens of prompt and answer.
    """
    slot = (info.num_self_attention_layers + info.num_cross_attention_layers) * info.kv_bytes_per_position
    return _bytes(num_positions * slot, num_images * info.max_tiles * info.features_per_tile * slot)


def _bytes(of_self: int, cross: int) -> dict[str, int]:
    return {"self": of_self, "cross": cross, "total": of_self + cross}


def _item(name: str, tile_size: int) -> Item:
    rng, kinds = random.Random(name), _CASES[name]
    return Item(0, next(iter(kinds), "text"), _QUESTION, tuple(picture_of(kind, rng, tile_size) for kind in kinds))


def _size(num_bytes: int) -> str:
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:.1f} MiB" if mebibytes >= 1 else f"{num_bytes / 2**10:.0f} KiB"


def table(report: dict[str, Any]) -> str:
    """Bytes of one request by layout, and requests at once in equal bytes, as Markdown."""
    return "\n\n".join([*(_table_of_model(model) for model in report["models"]), origin(report)])


def _table_of_model(model: dict[str, Any]) -> str:
    cap = f", at most {model['max_kept_fraction']:.0%} of the features kept" if model["max_kept_fraction"] else ""
    title = f"**{model['model']}** ({model['dtype']}, k_ratio {model['k_ratio']:g}{cap})"
    rows = []
    for name, request in model["requests"].items():
        features, ratio = request["features"], request["cross_bytes_over_transformers"]
        sizes = [_size(request["bytes"][layout]["total"]) for layout in _LAYOUTS]
        held = features["kept"] + features["merged"]
        rows.append([_NAMES[name], features["valid"], held, *sizes, "" if ratio is None else f"{ratio:.3f}"])
    at_once = model["at_once"]
    counts = [[_NAMES[name], *(of[layout] for layout in _LAYOUTS)] for name, of in at_once.items() if name in _NAMES]
    parts = [
        f"{title}, answers of {model['max_new_tokens']} tokens; one request holds:",
        markdown(["request", "features", "held", *_LAYOUTS.values(), "cross KV over transformers'"], rows),
        f"Requests that run at once in {_size(at_once['kv_bytes'])} of KV:",
        markdown(["request", *_LAYOUTS.values()], counts),
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Measure and write."""
    arguments = command_line(__doc__, "bytes.json", bench_model=BENCH_MODEL, quick=False)
    models: list[dict[str, Any]] = []
    for name in MODELS[:1] if arguments.quick else MODELS:
        model, tokens = under_test(name, arguments.bench_model), 32 if arguments.quick else 128
        noted(models, _Account(model, tokens, arguments.threads).run())
    finish(arguments, {"models": models})


if __name__ == "__main__":
    main()
