"""Decode steps in fixed buffers, made ready once for every size of batch: on a GPU each is a CUDA graph.

How a step is captured is a function that is handed in, so that the same code runs step by step on a CPU, where it is
tested.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from trimserve.model.decode_rows import NewRows
from trimserve.model.step_buffers import StepBuffers, StepInputs

__all__ = ["BucketedDecode", "Capture", "CudaGraphs", "Step"]

Step = Callable[[], Tensor]
"""A step over what the buffers hold now: its logits [bucket, vocab_size]."""

Capture = Callable[[Step], Step]
"""Makes a step ready to be taken many times."""


class CudaGraphs:
    """Captures steps as CUDA graphs that share their memory, since they run one after another."""

    def __init__(self) -> None:
        """Begin with a memory pool of their own, and a stream: cuBLAS keeps a workspace for each that it saw."""
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, step: Step) -> Step:
        """Capture a step, after it was taken once, for what libraries make ready on first use.

        Returns:
            Replays it; the logits hold until another of the steps is taken.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on to ask about memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            logits = step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


class BucketedDecode:
    """Steps for every bucket, with and without cross-attention layers."""

    def __init__(self, forward: Callable[[StepInputs], Tensor], buffers: StepBuffers, capture: Capture) -> None:
        """Capture them all.

        Args:
            forward: from a step's inputs to float32 logits [bucket, vocab_size]; waits for nothing on the device.
            buffers: what it reads.
            capture: such as `CudaGraphs()`.
        """
        self._buffers = buffers

        def step(bucket: int, has_features: bool) -> Tensor:
            return forward(buffers.inputs(bucket, has_features=has_features))

        self._steps: dict[tuple[int, bool], Step] = {}
        for bucket in reversed(buffers.buckets):  # the largest first: the others fit into memory that it used
            buffers.clear(bucket)
            for has_features in (True, False):
                self._steps[bucket, has_features] = capture(partial(step, bucket, has_features))

    def takes(self, new: NewRows) -> bool:
        """Whether the rows are few enough, of the base model, and lie in the pages that the steps know."""
        if any(kv.adapter is not None for kv in new.kvs):
            return False
        return len(new.kvs) <= self._buffers.buckets[-1] and new.kvs[0].pages is self._buffers.pages

    def __call__(self, token_ids: Sequence[int] | Tensor, new: NewRows) -> Tensor:
        """See `Mllama.decode`."""
        return self._steps[self._buffers.fill(token_ids, new)]()[: len(new.kvs)]
