"""What it costs that image files are decoded by processes of their own.

    python -m benchmarks.bench_images [--out FILE] [--quick]

The same photograph is made into tiles in a thread and through a `DecoderPool`, by turns, so that whatever else the
machine does hits both: one request after the other, and from 16 threads at once. Both ways must give the same tiles,
bit for bit.
"""

import argparse
import io
import json
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from benchmarks.serve.report import about, write_json
from trimserve.config import EngineConfig
from trimserve.imaging.decode import Pixels, decode_pixels
from trimserve.imaging.limits import Limits
from trimserve.imaging.pool import DecoderPool
from trimserve.model.images import prepare_image
from trimserve.model.prepared import PreparedImage

__all__ = ["main"]

_OUT = Path(__file__).parent / "results" / "images.json"
_TILE_SIZE, _MAX_TILES = 560, 4  # of the 11B model

Prepare = Callable[[bytes], PreparedImage]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How much is measured."""

    width: int = 1632
    height: int = 1224
    num_processes: int = EngineConfig().num_preprocess_workers
    num_rounds: int = 30
    num_at_once: int = 16
    num_rounds_at_once: int = 40


def main() -> None:
    """Command line; the last line of standard output is the report as one JSON document."""
    arguments = _arguments()
    plan, start = _Plan(), time.monotonic()
    if arguments.quick:
        plan = _Plan(num_rounds=5, num_rounds_at_once=1)
    torch.set_num_threads(1)
    files = {name: _photograph(plan, name) for name in ("JPEG", "PNG", "WEBP")}
    limits = Limits(EngineConfig().max_image_pixels)
    pool = DecoderPool(plan.num_processes, limits)
    pool.start()
    ways = {
        "thread": _way(lambda data: nullcontext(decode_pixels(data, "image", limits.max_pixels))),
        "process": _way(lambda data: pool.decode(data, "image")),
    }
    rows = []
    for name, data in files.items():
        ours, theirs = (way(data) for way in ways.values())
        if not (torch.equal(ours.pixel_values, theirs.pixel_values) and ours.key == theirs.key):
            raise SystemExit(f"{name}: the tiles differ")
        rows.append({"format": name, "num_bytes": len(data), **_measure(ways, data, plan, name)})
    pool.close()
    report = {
        "benchmark": "images",
        **about(1),
        "seconds": round(time.monotonic() - start, 1),
        "plan": asdict(plan),
        "rows": rows,
    }
    write_json(report, arguments.out)
    Console(stderr=True).print(_table(rows))
    print(json.dumps(report))


def _photograph(plan: _Plan, file_format: str) -> bytes:
    """A file of gradients with some noise."""
    y, x = np.mgrid[: plan.height, : plan.width]
    smooth = np.stack([x * 255 / plan.width, y * 255 / plan.height, (x + y) * 127 / plan.height], axis=-1)
    noisy = smooth + np.random.default_rng(0).normal(0, 6, smooth.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(buffer, file_format)
    return buffer.getvalue()


def _way(decode: Callable[[bytes], AbstractContextManager[Pixels]]) -> Prepare:
    """A file into tiles, with one way to decode it."""
    processor = MllamaImageProcessorPil(size={"height": _TILE_SIZE, "width": _TILE_SIZE}, max_image_tiles=_MAX_TILES)

    def prepare(data: bytes) -> PreparedImage:
        with decode(data) as pixels:
            return prepare_image(pixels, processor)

    return prepare


def _measure(ways: dict[str, Prepare], data: bytes, plan: _Plan, name: str) -> dict[str, Any]:
    """Seconds of one image alone, and of each image when many are asked for at once by as many threads as workers."""
    alone: dict[str, list[float]] = {way: [] for way in ways}
    at_once: dict[str, list[float]] = {way: [] for way in ways}
    console = Console(stderr=True)
    for _ in track(range(plan.num_rounds), f"{name}, one", console=console):
        for way, prepare in ways.items():
            alone[way].append(_seconds(partial(prepare, data)))
    with ThreadPoolExecutor(plan.num_processes) as threads:  # as many as a server has workers for images
        for _ in track(range(plan.num_rounds_at_once), f"{name}, {plan.num_at_once}", console=console):
            for way, prepare in ways.items():
                images = [data] * plan.num_at_once
                at_once[way].append(_seconds(lambda images=images, p=prepare: list(threads.map(p, images))))  # type: ignore[misc]  # bound early
    return {
        "alone_seconds": {way: _spread(values) for way, values in alone.items()},
        "at_once_seconds_per_image": {
            way: _spread([value / plan.num_at_once for value in values]) for way, values in at_once.items()
        },
        "at_once_ratio": _ratio(at_once["process"], at_once["thread"]),
    }


def _ratio(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Median of what pairs of them have as ratio, with a 95 % interval by bootstrap."""
    ratios = [value / other for value, other in zip(values, others, strict=True)]
    rng = random.Random(0)
    medians = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"median": round(median(ratios), 4), "low": round(medians[50], 4), "high": round(medians[-51], 4)}


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _spread(values: Sequence[float]) -> dict[str, float]:
    tenths = quantiles(values, n=10) if len(values) > 1 else [values[0]] * 9
    return {"p10": round(tenths[0], 4), "median": round(median(values), 4), "p90": round(tenths[-1], 4)}


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Milliseconds for a file into tiles, median", title_justify="left")
    for column in ("format", "alone: thread", "process", "at once, each: thread", "process"):
        table.add_column(column, justify="right")
    for row in rows:
        kinds = (row["alone_seconds"], row["at_once_seconds_per_image"])
        cells = (f"{kind[way]['median'] * 1e3:.1f}" for kind in kinds for way in ("thread", "process"))
        table.add_row(row["format"], *cells)
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=_OUT, help="the report")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see whether it works")
    return parser.parse_args()


if __name__ == "__main__":
    main()
