"""Counts bytes of keys and values: what a request holds, and how many requests the same bytes hold.

    python -m benchmarks.bench_bytes [--bench-model DIR] [--out FILE] [--quick]

Requests about an image of four tiles and about one of one tile, trimmed and untrimmed. trimserve's bytes come from the
account of an engine, which is what a server tells, transformers' from the tensors of its cache. The figures are bytes,
not times, so the machine need not be quiet.
"""

import random
from typing import Any, Final

import torch

from benchmarks.load import Kind, picture_of
from benchmarks.models import BENCH_MODEL, MODELS, UnderTest, under_test
from benchmarks.ours import chat, recommended
from benchmarks.report import command_line, finish, markdown, noted, origin
from benchmarks.rival import Rival
from tests.engine.stepping import Output, make_engine, start, tokens
from tests.model.peer import Peer
from trimserve.api.chunks import Started
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.engine import Engine
from trimserve.engine.memory import prefill_scratch_bytes
from trimserve.engine.sequence import Sequence, SequenceState
from trimserve.evaluation.answers import UNTRIMMED
from trimserve.model.loading import load_model

__all__ = ["main", "table"]

_KINDS: Final[dict[Kind, str]] = {"four_tiles": "4 tiles", "one_tile": "1 tile"}
_LAYOUTS: Final = {
    "trimserve": "trimserve",
    "trimserve_untrimmed": "trimserve, untrimmed",
    "transformers": "transformers",
}
_OURS: Final = ("trimserve", "trimserve_untrimmed")
_QUESTION: Final = "What is in the image? Answer in one sentence and name every colour."
_PEERS_AT_ONCE: Final = 8
"""Requests are counted in the bytes that so many requests with a 4-tile image take in transformers' caches."""
_ALL_AT_ONCE_SECONDS: Final = 3600
"""A slice of prefill so long that whatever fits is in before the first decode step."""
_ENOUGH_BYTES: Final = 2**27
"""Of KV for one request, and of encoded images."""


class _Account:
    """What is known of one model; all figures are bytes or counts."""

    def __init__(self, model: UnderTest, num_tokens: int) -> None:
        """Load a model, whose answers have so many tokens."""
        self._under_test, self._num_tokens = model, num_tokens
        self._model = load_model(ModelConfig(model=str(model.checkpoint)), EngineConfig())
        self._trims = dict(zip(_OURS, (recommended(self._model.info, model.max_kept_fraction), UNTRIMMED), strict=True))
        self._pictures = {kind: picture_of(kind, random.Random(kind), self._model.info.tile_size) for kind in _KINDS}

    @torch.inference_mode()
    def run(self) -> dict[str, Any]:
        """Everything, as plain data."""
        info, peer = self._model.info, Peer(self._under_test.checkpoint)
        requests = {kind: self._request(kind, peer) for kind in _KINDS}
        kv_bytes = _PEERS_AT_ONCE * requests["four_tiles"]["bytes"]["transformers"]["total"]
        at_once = {kind: self._at_once(kind, requests[kind]["bytes"], kv_bytes) for kind in _KINDS}
        return {
            "model": self._under_test.name,
            "dtype": info.dtype,
            "k_ratio": info.default_k_ratio,
            "merge_ratio": info.default_merge_ratio,
            "max_kept_fraction": self._under_test.max_kept_fraction,
            "max_new_tokens": self._num_tokens,
            "requests": requests,
            "at_once": {"kv_bytes": kv_bytes, **at_once},
        }

    def _request(self, kind: Kind, peer: Peer) -> dict[str, Any]:
        """What one request holds when its answer is complete; trimserve's but for the last token."""
        sizes = {}
        for layout in reversed(_OURS):  # features are told of the trimmed one, which is last
            engine, [(_, output)] = self._asked(kind, layout, 1, _ENOUGH_BYTES)
            _decode(engine, output, self._num_tokens)
            sizes[layout] = _bytes(engine.pool.used_self_bytes, engine.pool.used_cross_bytes)
        [image] = next(chunk.images for chunk in output if isinstance(chunk, Started))
        rival = Rival.asked(peer, _QUESTION, self._pictures[kind])
        sizes["transformers"] = _bytes(*rival.cache_bytes(self._num_tokens))
        return {
            "bytes": sizes,
            "features": {name: getattr(image, f"{name}_features") for name in ("valid", "kept", "merged")},
            "cross_bytes_over_transformers": round(sizes["trimserve"]["cross"] / sizes["transformers"]["cross"], 4),
        }

    def _at_once(self, kind: Kind, of_one: dict[str, dict[str, int]], kv_bytes: int) -> dict[str, int]:
        """How many of equal requests run at the same time when half of the first answer is there."""
        found = {"transformers": kv_bytes // of_one["transformers"]["total"]}
        for layout in _OURS:
            most = 2 * (kv_bytes // of_one[layout]["total"]) + 2  # half an answer takes no less than half of the pages
            engine, asked = self._asked(kind, layout, most, kv_bytes)
            _decode(engine, asked[0][1], self._num_tokens // 2)
            found[layout] = sum(sequence.state is SequenceState.RUNNING for sequence, _ in asked)
            assert found[layout] < most, f"{most} requests are too few to fill the pool"
        return found

    def _asked(
        self, kind: Kind, layout: str, num_requests: int, kv_bytes: int
    ) -> tuple[Engine, list[tuple[Sequence, Output]]]:
        engine = make_engine(
            self._model,
            max_batch=num_requests,
            kv_cache_bytes=kv_bytes + prefill_scratch_bytes(self._model.info),
            image_cache_bytes=_ENOUGH_BYTES,
            prefill_slice_seconds=_ALL_AT_ONCE_SECONDS,
        )
        sampling = SamplingParams(max_new_tokens=self._num_tokens + 1, ignore_eos=True, temperature=0.0)
        prompt, trim = chat(_QUESTION, self._pictures[kind]), self._trims[layout]
        requests = (GenerationRequest(f"{number}", prompt, sampling, trim) for number in range(num_requests))
        return engine, [start(engine, request) for request in requests]


def _decode(engine: Engine, output: Output, num_tokens: int) -> None:
    """Step until an answer has so many tokens."""
    while engine.has_work and len(tokens(output)) < num_tokens:
        engine.step()
    assert len(tokens(output)) == num_tokens, output[-1]


def _bytes(of_self: int, cross: int) -> dict[str, int]:
    return {"self": of_self, "cross": cross, "total": of_self + cross}


def _size(num_bytes: int) -> str:
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:.1f} MiB" if mebibytes >= 1 else f"{num_bytes / 2**10:.0f} KiB"


def table(report: dict[str, Any]) -> str:
    """Bytes of one request by layout, and requests at once in equal bytes, as Markdown."""
    return "\n\n".join([*(_table_of_model(model) for model in report["models"]), origin(report)])


def _table_of_model(model: dict[str, Any]) -> str:
    cap = f", at most {model['max_kept_fraction']:.0%} of the features kept" if model["max_kept_fraction"] else ""
    title = f"**{model['model']}** ({model['dtype']}, k_ratio {model['k_ratio']:g}{cap})"
    at_once, rows = model["at_once"], []
    for kind, name in _KINDS.items():
        request = model["requests"][kind]
        features, ratio = request["features"], request["cross_bytes_over_transformers"]
        sizes = [f"{_size(request['bytes'][layout]['total'])} ({at_once[kind][layout]})" for layout in _LAYOUTS]
        rows.append([name, features["valid"], features["kept"] + features["merged"], *sizes, f"{ratio:.3f}"])
    asked = f"answers of {model['max_new_tokens']} tokens"
    told = f"{title}, {asked}; what one request holds (how many run at once in {_size(at_once['kv_bytes'])} of KV):"
    head = ["request", "features", "held", *_LAYOUTS.values(), "cross KV over transformers'"]
    return f"{told}\n\n{markdown(head, rows)}"


def main() -> None:
    """Measure and write."""
    arguments = command_line(__doc__, "bytes.json", bench_model=BENCH_MODEL, quick=False)
    models: list[dict[str, Any]] = []
    for name in MODELS[:1] if arguments.quick else MODELS:
        model, num_tokens = under_test(name, arguments.bench_model), 32 if arguments.quick else 128
        noted(models, _Account(model, num_tokens).run())
    finish(arguments, {"models": models})


if __name__ == "__main__":
    main()
