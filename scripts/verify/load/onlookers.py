"""Those who ask how a busy server is: health checks, scrapes and reflection, from a process of their own.

A process of its own, because the clients that keep the server busy would make it wait for themselves.
"""

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from threading import Event
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from trimserve.loopback import proxy_options
from trimserve.process import read_page

__all__ = ["asked"]

_PAUSE_SECONDS = 0.1
_TIMEOUT_SECONDS = 300.0


@asynccontextmanager
async def asked(address: str, metrics_address: str) -> AsyncIterator[dict[str, list[float]]]:
    """Ask over and over while the block runs, at least once.

    Args:
        address: `HOST:PORT` of gRPC.
        metrics_address: `HOST:PORT` of `/metrics`.
    Yields:
        Filled at the end of the block: seconds of each answer, by what was asked. Who gets no answer raises.
    """
    spawn = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    seconds: dict[str, list[float]] = {}
    with spawn.Manager() as manager, ProcessPoolExecutor(1, spawn) as pool:
        is_over = manager.Event()
        asking = asyncio.get_running_loop().run_in_executor(pool, _ask, address, metrics_address, is_over)
        try:
            yield seconds
        finally:
            is_over.set()
            seconds |= await asking


def _ask(address: str, metrics_address: str, is_over: Event) -> dict[str, list[float]]:
    with grpc.insecure_channel(address, proxy_options(address)) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        acts: dict[str, Callable[[], object]] = {
            "health": lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_SECONDS),
            "metrics": lambda: read_page(f"http://{metrics_address}/metrics", _TIMEOUT_SECONDS),
            "reflection": lambda: list(reflection.ServerReflectionInfo(iter([question]), timeout=_TIMEOUT_SECONDS)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in acts}
        while True:
            for name, act in acts.items():
                start = time.perf_counter()
                act()
                seconds[name].append(time.perf_counter() - start)
            if is_over.wait(_PAUSE_SECONDS):
                return seconds
