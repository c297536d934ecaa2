"""What it costs that image files are decoded by processes of their own.

    python -m benchmarks.bench_images [--out FILE] [--quick]

The same photograph is made into tiles in a thread and through a `DecoderPool`, by turns, so that whatever else the
machine does hits both: one request after the other, and from 16 threads at once. Both ways must give the same tiles,
bit for bit.
"""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from benchmarks.measure import medians, seconds_in_pairs, speedup
from benchmarks.report import command_line, finish, noted
from trimserve.config import EngineConfig
from trimserve.imaging.decode import Pixels, decode_pixels
from trimserve.imaging.limits import Limits
from trimserve.imaging.pool import DecoderPool
from trimserve.model.images import prepare_image
from trimserve.model.prepared import PreparedImage

__all__ = ["main"]

_TILE_SIZE, _MAX_TILES = 560, 4  # of the 11B model
_WIDTH, _HEIGHT = 1632, 1224
_NUM_AT_ONCE: Final = 16
_NUM_PROCESSES: Final = EngineConfig().num_preprocess_workers

Prepare = Callable[[bytes], PreparedImage]


def _photograph(file_format: str) -> bytes:
    """A file of gradients with some noise."""
    y, x = np.mgrid[:_HEIGHT, :_WIDTH]
    smooth = np.stack([x * 255 / _WIDTH, y * 255 / _HEIGHT, (x + y) * 127 / _HEIGHT], axis=-1)
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


def _all(threads: ThreadPoolExecutor, prepare: Prepare, files: list[bytes]) -> None:
    for _ in threads.map(prepare, files):
        pass


def main() -> None:
    """Measure and write."""
    arguments = command_line(__doc__, "images.json", quick=False)
    rounds, rounds_at_once = (5, 2) if arguments.quick else (30, 40)
    limits = Limits(EngineConfig().max_image_pixels)
    pool = DecoderPool(_NUM_PROCESSES, limits)
    pool.start()
    thread = _way(lambda data: nullcontext(decode_pixels(data, "image", limits.max_pixels)))
    process = _way(lambda data: pool.decode(data, "image"))
    rows: list[dict[str, Any]] = []
    for name in ("JPEG", "PNG", "WEBP"):
        data = _photograph(name)
        ours, theirs = thread(data), process(data)
        if not (torch.equal(ours.pixel_values, theirs.pixel_values) and ours.key == theirs.key):
            raise SystemExit(f"{name}: the tiles differ")
        many = [data] * _NUM_AT_ONCE
        alone = seconds_in_pairs(partial(thread, data), partial(process, data), rounds)
        with ThreadPoolExecutor(_NUM_PROCESSES) as threads:  # as many as a server has workers for images
            one, other = (partial(_all, threads, way, many) for way in (thread, process))
            at_once = seconds_in_pairs(one, other, rounds_at_once)
        row: dict[str, Any] = {"format": name, "num_bytes": len(data)}
        for asked, pairs in (("alone", alone), ("at_once", at_once)):
            row[asked] = dict(zip(("thread_seconds", "process_seconds"), medians(pairs), strict=True)) | speedup(pairs)
        noted(rows, row)
    pool.close()
    plan = {"width": _WIDTH, "height": _HEIGHT, "num_processes": _NUM_PROCESSES, "num_at_once": _NUM_AT_ONCE}
    finish(arguments, {"plan": plan, "rows": rows})


if __name__ == "__main__":
    main()
