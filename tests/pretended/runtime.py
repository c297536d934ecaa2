"""torch's CUDA runtime over a pretended device: streams, events, graphs and memory, as far as the package uses them."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import trimserve.ops
from tests.csrc.build import load_fibers_for_cuda
from tests.pretended.device import Device, Recording

__all__ = ["pretended_device"]

_TOTAL_BYTES = 2**33


@contextmanager
def pretended_device() -> Iterator[Device]:
    """Let torch see one GPU on this thread, and our ops run as fibers there; no real one may be in this process."""
    assert not torch.cuda.is_available(), "there is a real one: use --device cuda"
    library = ctypes.CDLL(str(load_fibers_for_cuda()))
    library.trimserve_num_launches.restype = ctypes.c_uint64
    device = Device(library.trimserve_num_launches)
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="cuda")` is a copy from the host
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter cannot become another class
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_name", lambda *_: "a pretended device")
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (_TOTAL_BYTES, _TOTAL_BYTES))
        patch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
        patch.setattr(torch.cuda, "synchronize", lambda *_: device.wait("synchronize"))
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "current_stream", lambda *_: _Stream())
        patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        patch.setattr(torch.cuda, "Event", lambda **_: _Event(device))
        patch.setattr(torch.cuda, "graph_pool_handle", _Pool)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: _Graph(device))
        patch.setattr(torch.cuda, "graph", lambda graph, pool=None, **_: _capture(device, graph, pool))
        patch.setattr(trimserve.ops, "has_cuda_ops", lambda: True)
        try:
            with device:
                yield device
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_overwrite_module_params_on_conversion(False)


class _Generator(torch.Generator):
    """Of random numbers, always those of the CPU."""

    def __new__(cls, _device: Any = None) -> "_Generator":
        return super().__new__(cls)


class _Stream:
    def wait_stream(self, _: "_Stream") -> None: ...


@dataclass(slots=True)
class _Event:
    """Everything is done as soon as it is queued, but copies to the host arrive when they are waited for."""

    device: Device
    num_reads: int = 0

    def record(self, *_: Any) -> None:
        self.num_reads = self.device.num_reads

    def synchronize(self) -> None:
        self.device.counts.event_waits += 1
        self.device.read(self.num_reads)

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: "_Event") -> float:
        return 1.0


@dataclass(slots=True, eq=False)
class _Pool:
    """Memory that graphs share: results of one hold until another runs."""

    last: "_Graph | None" = None


@dataclass(slots=True, eq=False)
class _Graph:
    device: Device
    recording: Recording = field(default_factory=Recording)
    pool: _Pool = field(default_factory=_Pool)

    def replay(self) -> None:
        self.device.counts.replays += 1
        if self.pool.last is not None and self.pool.last is not self:
            self.pool.last.forget()
        self.recording.replay()
        self.pool.last = self

    def forget(self) -> None:
        """Another graph has overwritten the result."""
        for result in self.recording.steps[-1][1]:
            if result.is_floating_point():
                result.fill_(torch.nan)


@contextmanager
def _capture(device: Device, graph: _Graph, pool: _Pool | None) -> Iterator[None]:
    with device.capturing() as recording:
        yield
    graph.recording = recording
    if pool is not None:
        graph.pool = pool
