"""Asks a server the questions of a batch, some at a time.

Retries: what `service_config.json` says, which gRPC does by itself; and a server that is full is asked again after the
time that it names, for as long as it takes, because a batch has time.
"""

import json
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from trimserve.batch.lines import Line, parse
from trimserve.client import SERVICE_CONFIG, Client
from trimserve.errors import InvalidRequest
from trimserve.image_files import name_of
from trimserve.refusal import Refusal
from trimserve.v1 import generation_pb2 as pb

__all__ = ["Asker", "completed"]

_OF_THE_BATCH = {"CANCELLED", "UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED"}
"""Statuses that say nothing about the line: every other line would get them as well."""

_PATIENCE = json.loads(SERVICE_CONFIG.read_text())["methodConfig"][0]["retryPolicy"]["maxAttempts"]
"""Attempts at a line for which the server has no memory."""

Outcome = dict[str, Any]


class Asker:
    """Turns lines into outcomes."""

    def __init__(self, client: Client, folder: Path, sleep: Callable[[float], object] | None = None) -> None:
        """Ask nothing yet.

        Args:
            client: connected.
            folder: that paths of images begin at.
            sleep: waits for seconds; None waits until `stop`, at most.
        """
        self._client = client
        self._folder = folder
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait

    def stop(self) -> None:
        """Wait for a full server no more."""
        self._stopped.set()

    def outcome(self, line: Line) -> Outcome:
        """What comes of a line: `response`, or `error` with code and message.

        Args:
            line: of the input.
        Raises:
            grpc.RpcError: a status that is not about the line, such as UNAVAILABLE.
        """
        try:
            question = parse(line, self._folder)
        except InvalidRequest as error:
            return _error("INVALID_ARGUMENT", str(error))
        try:
            response = self._generate(question.request)
        except grpc.RpcError as error:
            refusal = Refusal.of(error)
            if refusal.code in _OF_THE_BATCH:
                raise
            file = name_of(refusal.field, question.files)
            return _error(refusal.code, refusal.message if file is None else f"{file}: {refusal.description}")
        return {
            "response": MessageToDict(
                response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
        }

    def _generate(self, request: pb.GenerateRequest) -> pb.GenerateResponse:
        attempt = 1
        while True:
            try:
                return self._client.generate(request)
            except grpc.RpcError as error:
                refusal = Refusal.of(error)
                is_hopeless = refusal.reason == "OUT_OF_MEMORY" and attempt == _PATIENCE
                if refusal.retry_seconds is None or is_hopeless or self._stopped.is_set():
                    raise
                self._sleep(refusal.retry_seconds * random.uniform(1, 1.5))  # not all at the same time
                attempt += 1


def completed(asker: Asker, lines: Iterable[Line], concurrency: int) -> Iterator[tuple[Line, Outcome]]:
    """Ask for each line, some at a time, in threads.

    Args:
        asker: what it raises ends the iteration.
        lines: taken as they are needed.
        concurrency: calls at a time, at least 1.
    Returns:
        Lines and outcomes, as they are completed.
    """
    waiting = iter(lines)
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="trimserve-batch")
    running: dict[Future[Outcome], Line] = {}
    try:
        while True:
            for line in islice(waiting, 2 * concurrency - len(running)):
                running[pool.submit(asker.outcome, line)] = line
            if not running:
                return
            done = wait(running, return_when=FIRST_COMPLETED).done
            for future in sorted(done, key=lambda each: each.exception() is not None):  # answers are not lost
                yield running.pop(future), future.result()
    finally:
        asker.stop()
        pool.shutdown(wait=False, cancel_futures=True)


def _error(code: str, message: str) -> Outcome:
    return {"error": {"code": code, "message": message}}
