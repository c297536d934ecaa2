"""Times what every policy takes to choose from an image of four tiles.

    python -m benchmarks.bench_policies [--bench-model DIR] [--runs 3] [--threads 1] [--out FILE]

Twice: alone, on random features of Llama-3.2-Vision 11B's shape, where one call is timed with what it held in memory;
and within the prefill of a question on the model `bench`, as a share of a prefill whose image is encoded already, and
of one that encodes it. Every policy keeps a fifth of the image, and compressors, which nothing was trained for, make as
many rows; `guided` asks a guide of half the width. Those that the docs recommend choose what is merged, too. A line is
told for each policy as it is done, in a few minutes altogether on one core; the last line is the report.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.load import draw_picture
from benchmarks.measure import peak_extra_bytes, seconds_of
from benchmarks.models import BENCH_MODEL, bench_model
from benchmarks.ours import QUESTION, chat
from benchmarks.report import Columns, command_line, finish, noted, origin, tabulated
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.pages import OwnPages
from trimserve.model.codebook import save_codebook
from trimserve.model.interruptible import run_through
from trimserve.model.loading import describe_model, load_model
from trimserve.model.mllama import Mllama
from trimserve.model.prefilled import Prefilled
from trimserve.model.prepared import PreparedPrompt
from trimserve.model.trained_file import save_trained, shape_of, trainable
from trimserve.trimming.compressor import Compressor
from trimserve.trimming.encoded_image import EncodedImage, Observation
from trimserve.trimming.plan import TrimPlan, choose_from_image, scratch_bytes, select
from trimserve.trimming.policies.exit import Router
from trimserve.trimming.policies.learned import Learned
from trimserve.trimming.policies.policy import CrossAttentionView, Place
from trimserve.trimming.policies.table import POLICIES
from trimserve.trimming.trained import Shape, Trained

__all__ = ["MOST_OF_PREFILL", "RECOMMENDED", "main", "table"]

RECOMMENDED: Final = ("trimmed", "cls")
"""What docs/policies.md tells people to switch on."""
MOST_OF_PREFILL: Final = 0.05
"""Share that choosing may take of a recommended policy's prefill, the image's encoding included."""

_KEEP, _MERGE_RATIO = 0.2, 0.1
_TILES, _SIZE, _DIM = 4, 1601, 4096
_ROWS, _HEADS, _KV_HEADS, _HEAD_DIM = 64, 32, 8, 128
_PROTOTYPES = 64
_COMPRESSED = 321
"""Rows of a tile, its class token included: windows of 16 x 20, and the count nearest to a fifth that windows allow."""
_VISION_LAYERS, _VISION_HEADS, _VISION_HEAD_DIM = 40, 16, 80
_FEATURES = _TILES * _SIZE
_GEOMETRY: Final = {"tiles": _TILES, "F": _SIZE, "N": _FEATURES, "D": _DIM, "T": _ROWS, "keep": _KEEP}
_POOL_BYTES = 2**28


def _load(folder: Path) -> Mllama:
    """The model with what every policy needs, drawn, which is as fast as what is found or trained."""
    config, limits = ModelConfig(model=str(folder)), EngineConfig()
    info = describe_model(config, limits)
    prototypes = torch.randn(_PROTOTYPES, info.hidden_size, generator=torch.Generator().manual_seed(0))
    with TemporaryDirectory() as drawn:
        codebook, compressors = Path(drawn) / "codebook.safetensors", []
        save_codebook(codebook, prototypes, info, config.intermediate_features)
        for name, module in _compressors(shape_of(info, _COMPRESSED)).items():
            compressors.append(Path(drawn) / f"{name}.safetensors")
            save_trained(compressors[-1], name, module, info, config.intermediate_features, [], {})
        guide = bench_model(Path(drawn) / "guide", narrower=2)
        needed = {"codebook": codebook, "compressor": tuple(compressors), "guide_model": str(guide)}
        return load_model(config.model_copy(update=needed), limits)


def _compressors(shape: Shape) -> dict[str, Trained]:
    """One of each method, not trained."""
    return {name: kind(shape).eval() for name, kind in trainable().items() if issubclass(kind, Compressor)}


def _requests() -> Iterator[TrimRequest]:
    """Every policy that chooses or makes rows, and the recommended ones with merging."""
    for name, policy in POLICIES.items():
        if policy.trained is Router:  # it only says when to leave
            continue
        request = TrimRequest(policy=name, budget=FixedRatio(_KEEP) if policy.budgets else None)
        yield request
        if name in RECOMMENDED:
            yield replace(request, merge_ratio=_MERGE_RATIO)


@torch.inference_mode()
def _alone(trim: TrimPlan, runs: int) -> dict[str, Any]:
    """Seconds of one choice at 11B's shape, scores of the heads included, and what it held meanwhile."""
    choose = _chooser(trim)
    seconds = median(seconds_of(choose) for _ in range(runs))
    return {"seconds": round(seconds, 5), "peak_extra_bytes": peak_extra_bytes(choose)}


def _chooser(trim: TrimPlan) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    features = draw(_FEATURES, _DIM)
    if trim.place is Place.BEFORE_DECODER:
        notes: dict[Observation, Callable[[], Tensor]] = {
            "class_attention": lambda: draw(_VISION_LAYERS, _FEATURES).softmax(dim=1),
            "vision_attention": lambda: draw(2, _FEATURES, _VISION_HEADS, _VISION_HEAD_DIM),
            "vision_states": lambda: draw(2, _FEATURES, _VISION_HEADS * _VISION_HEAD_DIM),
            "patch_entropy": lambda: draw(_FEATURES).abs(),
        }
        observed = {name: notes[name]() for name in sorted(trim.needs)}
        prototypes, text = draw(_PROTOTYPES, _DIM), draw(_DIM)
        trained = _compressors(Shape(_DIM, _SIZE, 2, _COMPRESSED)) if isinstance(trim.policy, Learned) else {}

        def encoded() -> EncodedImage:
            """A new image each time: one that was asked before would remember."""
            return EncodedImage(features, _SIZE, _VISION_LAYERS, observed, prototypes, trained)

        return lambda: choose_from_image(encoded(), trim, text).kept
    queries, keys = draw(_ROWS, _HEADS, _HEAD_DIM), draw(_FEATURES, _KV_HEADS, _HEAD_DIM)
    visibility = torch.tensor([[0, _FEATURES]] * _ROWS, dtype=torch.int32)
    shape = (features, visibility, _HEAD_DIM**-0.5, (_FEATURES,), _SIZE)
    return lambda: select(CrossAttentionView(queries, keys, *shape), trim).kept


class _Bench:
    """Prefills of a question about one new image of four tiles after another."""

    def __init__(self, model: Mllama, runs: int) -> None:
        pictures = (draw_picture(Random(seed), 2 * model.info.tile_size) for seed in range(runs))
        self._model, self._prompts = model, [model.prepare(chat(QUESTION, picture)) for picture in pictures]
        self._pool = OwnPages(model.info, _POOL_BYTES)
        self._encoded: dict[frozenset[Observation], list[tuple[float, EncodedImage]]] = {}

    def measure(self, trim: TrimPlan) -> dict[str, Any]:
        """Seconds from the scores to the kept set, those of the whole prefill, and the share of it.

        The share is told twice, for a prefill whose image is encoded already and for one that encodes it.
        """
        choosing, reading, encoding = [], [], []
        if trim.needs not in self._encoded:  # once for all policies that look at the same
            self._encoded[trim.needs] = [self._encode(prompt, trim.needs) for prompt in self._prompts]
        for prompt, (seconds, image) in zip(self._prompts, self._encoded[trim.needs], strict=True):
            kv = self._pool.key_values(len(prompt.token_ids), image.num_features)
            started_at = perf_counter()
            prefilled: Prefilled = run_through(self._model.prefill(prompt, [image], trim, kv))
            reading.append(perf_counter() - started_at)
            kv.release()
            encoding.append(seconds)
            assert prefilled.trim_times is not None
            choosing.append(prefilled.trim_times.selected_at - prefilled.trim_times.began_at)
        chose, read, encoded = map(median, (choosing, reading, encoding))
        return {
            "bench_seconds": round(chose, 5),
            "bench_prefill_seconds": round(read, 5),
            "bench_encode_seconds": round(encoded, 5),
            "share_of_prefill": round(chose / read, 5),
            "share_with_encoding": round(chose / (read + encoded), 5),
        }

    def _encode(self, prompt: PreparedPrompt, needs: frozenset[Observation]) -> tuple[float, EncodedImage]:
        [image] = prompt.images
        started_at = perf_counter()
        encoded = run_through(self._model.encode_image(image, needs))
        return perf_counter() - started_at, encoded


def table(report: dict[str, Any]) -> str:
    """What choosing takes, by policy, as Markdown."""
    columns: Columns = {
        "policy": lambda row: f"`{row['policy']}`{', merged' if row['merge_ratio'] else ''}",
        "11B's shape, ms": lambda row: f"{1e3 * row['seconds']:,.1f}",
        "memory, MiB": lambda row: "" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 2**20:,.0f}",
        "`bench`, ms": lambda row: f"{1e3 * row['bench_seconds']:,.1f}",
        "of a prefill": "{share_of_prefill:.1%}",
        "of one that encodes the image": _share,
    }
    aside = f"The engine sets {report['scratch_bytes'] / 2**20:,.0f} MiB aside for it at 11B's shape."
    return f"{tabulated(report['policies'], columns)}\n\n{origin(report)} {aside}"


def _share(row: dict[str, Any]) -> str:
    share = row["share_with_encoding"]
    return f"{share:.1%}{', slow' if share > MOST_OF_PREFILL else ''}"


def main() -> None:
    """Time, write, tell."""
    arguments = command_line(__doc__, "policies/speed.json", bench_model=BENCH_MODEL, runs=3)
    bench = _Bench(_load(bench_model(arguments.bench_model)), arguments.runs)
    rows: list[dict[str, Any]] = []
    for request in _requests():
        named, trim = {"policy": request.policy, "merge_ratio": request.merge_ratio}, TrimPlan.of(request)
        noted(rows, {**named, **_alone(trim, arguments.runs), **bench.measure(trim)})
    scratch = scratch_bytes(_TILES, _SIZE, _DIM)
    finish(arguments, {"geometry": _GEOMETRY, "scratch_bytes": scratch, "policies": rows})


if __name__ == "__main__":
    main()
