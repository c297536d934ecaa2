"""transformers, asked the same: its model and `generate`, in this process or one of its own, and `transformers serve`.

The model has Meta's semantics (`training.mended`), sdpa, and is called alike in every release from 5.17 on. The process
runs one call after the other, first come, first served: what `generate` behind a lock does. Its server is unmended.
"""

import base64
import copy
import io
import json
import multiprocessing
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, MllamaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from benchmarks.load import Answer, Ask, Item
from benchmarks.measure import seconds_of
from tests.model.peer import Peer
from training.mended import mend
from trimserve.config import Dtype
from trimserve.process import ServerFailed

__all__ = ["CACHE", "Rival", "Transformers", "cache_of", "transformers_serve"]

CACHE: Final = "cache" if "cache" in signature(MllamaForConditionalGeneration.forward).parameters else "past_key_values"
"""What the KV cache is called, as an argument and in outputs: `cache` from transformers 5.24 on."""

_NO_END: Final = -1
"""An end token that is never drawn; transformers warns of it, and does as it should."""


def cache_of(output: Any) -> Any:
    """The KV cache in what a forward pass or `generate` returns."""
    return getattr(output, CACHE)


class Rival:
    """transformers' modules as its `generate` calls them, with one prompt."""

    def __init__(self, model: Any, inputs: dict[str, Tensor]) -> None:
        """Take `MllamaForConditionalGeneration`, mended, and what its processor makes of a prompt with one image."""
        self.model = model
        self._inputs = inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}

    @classmethod
    def asked(cls, peer: Peer, question: str, image: bytes) -> "Rival":
        """A user's question about an image, which gets a full canvas of tiles."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = peer.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        token_ids = peer.processor.tokenizer(text, add_special_tokens=False).input_ids
        return cls(peer.model, peer.inputs(token_ids, [Image.open(io.BytesIO(image))]))

    @property
    def token_ids(self) -> list[int]:
        """Of the prompt."""
        token_ids: list[int] = self._inputs["input_ids"][0].tolist()
        return token_ids

    def encode(self) -> Tensor:
        """The image's features [tiles, features of a tile, D]."""
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        states = self.model.model.vision_model(**{name: self._inputs[name] for name in names}).last_hidden_state
        features: Tensor = self.model.model.multi_modal_projector(states)
        return features.reshape(-1, states.shape[-2], features.shape[-1])

    @cached_property
    def _features(self) -> Tensor:
        return self.encode()

    @cached_property
    def _prefilled(self) -> Any:
        return self.prefill()

    @property
    def logits(self) -> Tensor:
        """Of the prompt's last row, [V]."""
        logits: Tensor = self._prefilled.logits[0, -1]
        return logits

    def prefill(self) -> Any:
        """The prompt's output, with a cache that grows; the image is encoded once."""
        names = ("input_ids", "attention_mask", "cross_attention_mask")
        inputs = {name: self._inputs[name] for name in names}
        return self.model(**inputs, cross_attention_states=self._features, use_cache=True, logits_to_keep=1)

    def step(self, batch: int) -> Callable[[], Tensor]:
        """A decode step of `batch` copies of the sequence, logits [B, 1, V]; each call is one position longer."""
        grown = copy.deepcopy(cache_of(self._prefilled))
        grown.batch_repeat_interleave(batch)
        length, device = self._inputs["input_ids"].shape[1], self.model.device
        token_ids = torch.full((batch, 1), 5, device=device)
        sees = self._inputs["cross_attention_mask"][:, -1:].repeat(batch, 1, 1, 1)

        def run() -> Tensor:
            nonlocal length
            length += 1
            logits: Tensor = self.model(
                input_ids=token_ids,
                attention_mask=torch.ones(batch, length, dtype=torch.int64, device=device),
                # A row for every position, of which transformers takes the last: 5.17 accepts nothing else.
                cross_attention_mask=sees.expand(-1, length, -1, -1),
                use_cache=True,
                **{CACHE: grown},
            ).logits
            return logits

        return run

    def cache_bytes(self, num_tokens: int) -> tuple[int, int]:
        """What the tensors of the cache hold, of self- and of cross-attention, when an answer is complete."""
        output = self.model.generate(**self._inputs, **_options(num_tokens), return_dict_in_generate=True)
        layers = cache_of(output).layers
        sizes = [layer.keys.nbytes + layer.values.nbytes if layer.is_initialized else 0 for layer in layers]
        cross = sum(sizes[index] for index in self.model.config.text_config.cross_attention_layers)
        return sum(sizes) - cross, cross


class Transformers:
    """A process that calls `generate`; a context manager."""

    def __init__(self, model: Path, *, dtype: Dtype, num_threads: int, max_new_tokens: int) -> None:
        """Start it when first asked.

        Args:
            model: folder of a checkpoint.
            dtype: what it computes in.
            num_threads: of one op.
            max_new_tokens: of every answer, exactly: end tokens are ignored.
        """
        self._max_new_tokens = max_new_tokens
        self._process = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_load, initargs=(model, dtype, num_threads)
        )

    def __enter__(self) -> "Transformers":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()

    def ask(self, item: Item) -> Answer:
        """See `load.Ask`."""
        return self._process.submit(_generate, item, self._max_new_tokens).result()

    def batch(self, items: Sequence[Item]) -> float:
        """Generate for several items in one call, prompts padded on the left; the seconds that it took."""
        return self._process.submit(_generate_batch, items, self._max_new_tokens).result()

    def warm_up(self, item: Item) -> int:
        """Load the model and make it run once; the process's id."""
        self._process.submit(_generate, item, 2).result()
        return self._process.submit(os.getpid).result()


# ---- in the process ----

_loaded: Any = None  # model and processor: a worker process has no other place to keep them


def _load(folder: Path, dtype: Dtype, num_threads: int) -> None:
    global _loaded
    torch.set_num_threads(num_threads)
    model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    _loaded = mend(model), processor


class _Clock(BaseStreamer):
    """Stamps each token; the first thing that `generate` puts is the prompt."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, _: Tensor) -> None:
        self.stamps.append(time.monotonic())

    def end(self) -> None:
        """Nothing is held back."""


def _generate(item: Item, max_new_tokens: int) -> Answer:
    clock = _Clock()
    token_ids = _answer([item], max_new_tokens, streamer=clock)
    return Answer(tuple(clock.stamps[1:]), len(token_ids), tuple(token_ids))


def _generate_batch(items: Sequence[Item], max_new_tokens: int) -> float:
    return seconds_of(lambda: _answer(items, max_new_tokens))


@torch.inference_mode()
def _answer(items: Sequence[Item], max_new_tokens: int, **options: Any) -> list[int]:
    """Token ids of the first item's answer."""
    inputs = _inputs(items)
    sequences = _loaded[0].generate(**inputs, **_options(max_new_tokens), **options)
    token_ids: list[int] = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return token_ids


def _inputs(items: Sequence[Item]) -> BatchFeature:
    model, processor = _loaded
    texts, images = [], []
    for item in items:
        content = [*({"type": "image"} for _ in item.images), {"type": "text", "text": item.question}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        images.append([Image.open(io.BytesIO(image)) for image in item.images])
    shown = images if any(images) else None
    inputs: BatchFeature = processor(
        images=shown, text=texts, padding=True, add_special_tokens=False, return_tensors="pt"
    )
    return inputs.to(model.dtype)  # of integers it leaves the dtype


def _options(max_new_tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": _NO_END}


# ---- transformers serve ----


@contextmanager
def transformers_serve(
    venv: Path, model: Path, *, dtype: Dtype, num_threads: int, max_new_tokens: int
) -> Iterator[tuple[Ask, int]]:
    """Run `transformers serve` until the block ends: what asks it, streaming, and its process id.

    Args:
        venv: an environment with `transformers[serving]`.
        model: folder of a checkpoint.
        dtype: what it computes in.
        num_threads: of one op.
        max_new_tokens: of every answer, exactly: end tokens are ignored.
    Raises:
        ServerFailed: it ended, or did not answer within two minutes.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(venv / "bin/transformers"), "serve", str(model.absolute()), "--device", "cpu", "--dtype", dtype]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
    options = json.dumps(_options(max_new_tokens) | {"pad_token_id": 0})
    body = {"model": str(model.absolute()), "stream": True, "generation_config": options}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            if not _is_up(port, process):
                log.seek(0)
                raise ServerFailed(f"transformers serve: {log.read().strip()[-2000:]}")
            yield partial(_ask, f"http://127.0.0.1:{port}/v1/chat/completions", body), process.pid
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


def _ask(url: str, body: dict[str, Any], item: Item) -> Answer:
    urls = [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in item.images]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*images, {"type": "text", "text": item.question}]
    data = json.dumps({**body, "messages": [{"role": "user", "content": content}]}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    arrivals, num_tokens = [], 0
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as lines:
            for line in lines:
                event = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: {") else {}
                if "error" in event:
                    return Answer(error=str(event["error"]))
                if event and event["choices"][0]["delta"].get("content"):
                    arrivals.append(time.monotonic())
                num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
    except urllib.error.HTTPError as error:
        return Answer(error=f"{error}: {error.read().decode()[:2000]}")
    return Answer(tuple(arrivals), num_tokens) if arrivals and num_tokens else Answer(error="the stream ended early")
