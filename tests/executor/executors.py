"""Executors that prove that plans and results are plain data: one that pickles them, one in another process."""

import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trimserve.api.adapter import AdapterInfo
from trimserve.api.constraint import Constraint
from trimserve.api.info import ModelInfo
from trimserve.executor.executor import Executor
from trimserve.executor.local import LocalExecutor
from trimserve.executor.model import Model
from trimserve.executor.plan import StepPlan, StepResult

__all__ = ["PicklingExecutor", "ProcessExecutor"]


class PicklingExecutor:
    """Hands copies of plans to another executor, and copies of its results back."""

    def __init__(self, executor: Executor) -> None:
        """Of an executor that nobody else uses."""
        self._executor = executor
        self.info = executor.info
        self.runs_ahead = executor.runs_ahead

    def allocate(self, num_pages: int, layers_per_page: int) -> None:
        self._executor.allocate(num_pages, layers_per_page)

    def free_pages(self) -> None:
        self._executor.free_pages()

    def warm_up(self, max_batch: int) -> None:
        self._executor.warm_up(max_batch)

    def load_adapter(self, name: str, folder: Path) -> AdapterInfo:
        return self._executor.load_adapter(name, folder)

    def unload_adapter(self, name: str) -> None:
        self._executor.unload_adapter(name)

    def compile(self, constraint: Constraint) -> None:
        self._executor.compile(pickle.loads(pickle.dumps(constraint)))

    def watch(self, on_failure: Callable[[BaseException], None]) -> None:
        self._executor.watch(on_failure)

    def close(self) -> None:
        self._executor.close()

    def run(self, plan: StepPlan) -> StepResult:
        result: StepResult = pickle.loads(pickle.dumps(self._executor.run(pickle.loads(pickle.dumps(plan)))))
        return result


class ProcessExecutor:
    """A `LocalExecutor` in a process of its own; calls go through a pipe, as bytes."""

    def __init__(self, load: Callable[[], Model]) -> None:
        """Start the process.

        Args:
            load: makes the model there; must be picklable.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, load), daemon=True)
        self._process.start()
        self.info: ModelInfo = self._pipe.recv()
        self.runs_ahead = False

    def allocate(self, num_pages: int, layers_per_page: int) -> None:
        self._call("allocate", num_pages, layers_per_page)

    def free_pages(self) -> None:
        self._call("free_pages")

    def warm_up(self, max_batch: int) -> None:
        self._call("warm_up", max_batch)

    def load_adapter(self, name: str, folder: Path) -> AdapterInfo:
        info: AdapterInfo = self._call("load_adapter", name, folder)
        return info

    def unload_adapter(self, name: str) -> None:
        self._call("unload_adapter", name)

    def compile(self, constraint: Constraint) -> None:
        self._call("compile", constraint)

    def watch(self, on_failure: Callable[[BaseException], None]) -> None:
        del on_failure

    def run(self, plan: StepPlan) -> StepResult:
        result: StepResult = self._call("run", plan)
        return result

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join(60)

    def _call(self, method: str, *arguments: object) -> Any:
        self._pipe.send((method, arguments))
        return self._pipe.recv()


def _serve(pipe: Connection, load: Callable[[], Model]) -> None:
    executor = LocalExecutor(load())
    pipe.send(executor.info)
    while (call := pipe.recv()) is not None:
        method, arguments = call
        pipe.send(getattr(executor, method)(*arguments))
