"""transformers, asked the same: its `generate` in a process of its own, and its own server, `transformers serve`.

The process runs transformers' Mllama with Meta's semantics (`training.mended`), one call after the other, first come
first served: what `generate` behind a lock does.
"""

import asyncio
import base64
import io
import json
import multiprocessing
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, MllamaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from benchmarks.serve.load import Answer
from benchmarks.serve.service import peak_rss_bytes
from benchmarks.serve.workload import Item
from benchmarks.transformers_step import cache_of
from training.mended import mend
from trimserve.process import ServerFailed

__all__ = ["CacheBytes", "Transformers", "TransformersServe", "transformers_serve"]

_NO_END = -1
"""An end token that is never drawn; transformers warns of it, and does as it should."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """What transformers' cache holds of one request when its answer is complete, counted from its tensors."""

    cross: int
    """Of the cross-attention layers."""
    self: int
    """Of the self-attention layers."""


class Transformers:
    """A process that calls `generate`; a context manager."""

    def __init__(self, model: Path, *, num_threads: int, max_new_tokens: int) -> None:
        """Start it when first asked.

        Args:
            model: folder of a checkpoint.
            num_threads: of one op.
            max_new_tokens: of every answer, exactly: end tokens are ignored.
        """
        self._max_new_tokens = max_new_tokens
        self._process = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_load, initargs=(model, num_threads)
        )

    def __enter__(self) -> "Transformers":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()

    async def ask(self, item: Item) -> Answer:
        """See `load.Ask`."""
        return await self._call(_generate, item, self._max_new_tokens)

    async def batch(self, items: Sequence[Item]) -> float:
        """Generate for several items in one call, prompts padded on the left; the seconds that it took."""
        return await self._call(_generate_batch, list(items), self._max_new_tokens)

    async def cache_bytes(self, item: Item) -> CacheBytes:
        """Answer one item and measure the cache that is left."""
        return await self._call(_cache_bytes, item, self._max_new_tokens)

    async def warm_up(self, item: Item) -> None:
        """Load the model and make it run once."""
        await self._call(_generate, item, 2)

    async def peak_rss_bytes(self) -> int | None:
        """Most resident memory of the process so far."""
        return await self._call(_own_peak_rss_bytes)

    async def _call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._process, function, *arguments)


# ---- in the process ----

_loaded: Any = None  # model and processor: a worker process has no other place to keep them


def _load(folder: Path, num_threads: int) -> None:
    global _loaded
    torch.set_num_threads(num_threads)
    model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    _loaded = mend(model), processor


class _Clock(BaseStreamer):
    """Stamps each token; the first thing that `generate` puts is the prompt."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.stamps.append(time.monotonic())

    def end(self) -> None:
        """Nothing is held back."""


@torch.inference_mode()
def _generate(item: Item, max_new_tokens: int) -> Answer:
    clock = _Clock()
    inputs = _inputs([item])
    output = _loaded[0].generate(**inputs, **_options(max_new_tokens), streamer=clock)
    num_prompt_tokens = inputs["input_ids"].shape[1]
    token_ids = output[0, num_prompt_tokens:].tolist()
    return Answer(tuple(clock.stamps[1:]), len(token_ids), num_prompt_tokens, tuple(token_ids))


@torch.inference_mode()
def _generate_batch(items: list[Item], max_new_tokens: int) -> float:
    start = time.monotonic()
    _loaded[0].generate(**_inputs(items), **_options(max_new_tokens))
    return time.monotonic() - start


@torch.inference_mode()
def _cache_bytes(item: Item, max_new_tokens: int) -> CacheBytes:
    model = _loaded[0]
    options = _options(max_new_tokens)
    cache = cache_of(model.generate(**_inputs([item]), **options, return_dict_in_generate=True))
    sizes = [layer.keys.nbytes + layer.values.nbytes if layer.is_initialized else 0 for layer in cache.layers]
    cross = sum(sizes[index] for index in model.config.text_config.cross_attention_layers)
    return CacheBytes(cross, sum(sizes) - cross)


def _own_peak_rss_bytes() -> int | None:
    return peak_rss_bytes(os.getpid())


def _inputs(items: Sequence[Item]) -> BatchFeature:
    processor = _loaded[1]
    texts, images = [], []
    for item in items:
        content = [*({"type": "image"} for _ in item.images), {"type": "text", "text": item.question}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        images.append([Image.open(io.BytesIO(image)) for image in item.images])
    inputs: BatchFeature = processor(
        images=images if any(images) else None,
        text=texts,
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    return inputs


def _options(max_new_tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": _NO_END}


# ---- transformers serve ----


@contextmanager
def transformers_serve(
    venv: Path, model: Path, *, num_threads: int, max_new_tokens: int
) -> Iterator["TransformersServe"]:
    """Run `transformers serve` until the block ends.

    Args:
        venv: an environment with `transformers[serving]`.
        model: folder of a checkpoint.
        num_threads: of one op.
        max_new_tokens: of every answer, exactly: end tokens are ignored.
    Raises:
        ServerFailed: it ended, or did not answer within two minutes.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(venv / "bin/transformers"), "serve", str(model.absolute()), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            if not _is_up(port, process):
                log.seek(0)
                raise ServerFailed(f"transformers serve: {log.read().strip()[-2000:]}")
            yield TransformersServe(port, process.pid, model.absolute(), max_new_tokens)
        finally:
            process.terminate()


def _is_up(port: int, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.2)  # it tells nobody when it listens
        else:
            return True
    return False


class TransformersServe:
    """Asks `transformers serve` over HTTP, streaming."""

    def __init__(self, port: int, pid: int, model: Path, max_new_tokens: int) -> None:
        """Use `transformers_serve`."""
        self._port = port
        self.pid = pid
        self._model = str(model)
        options = _options(max_new_tokens) | {"pad_token_id": 0}
        self._generation_config = json.dumps(options)

    async def ask(self, item: Item) -> Answer:
        """See `load.Ask`."""
        body = json.dumps(
            {
                "model": self._model,
                "stream": True,
                "generation_config": self._generation_config,
                "messages": [{"role": "user", "content": _content(item)}],
            }
        ).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\n"  # 1.0: no chunks to undo
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        try:
            writer.write(head.encode() + body)
            status = (await reader.readline()).decode().strip()
            while (await reader.readline()).strip():
                pass
            if " 200 " not in f"{status} ":
                return Answer(error=f"{status}: {(await reader.read()).decode()[:2000]}")
            return await _read_events(reader)
        finally:
            writer.close()


def _content(item: Item) -> list[dict[str, Any]]:
    urls = [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in item.images]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*images, {"type": "text", "text": item.question}]


async def _read_events(reader: asyncio.StreamReader) -> Answer:
    """Server-sent events until the connection ends."""
    arrivals: list[float] = []
    usage: dict[str, int] = {}
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            return Answer(error=str(event["error"]))
        if event["choices"][0]["delta"].get("content"):
            arrivals.append(time.monotonic())
        usage = event.get("usage") or usage
    if not arrivals or not usage:
        return Answer(error="the stream ended early")
    return Answer(tuple(arrivals), usage["completion_tokens"], usage["prompt_tokens"])
