"""What the engine needs of an executor: the seam between deciding what runs and running it."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from trimserve.api.adapter import AdapterInfo
from trimserve.api.constraint import Constraint
from trimserve.api.info import ModelInfo
from trimserve.executor.plan import StepPlan, StepResult

__all__ = ["Executor"]


class Executor(Protocol):
    """Runs plans, one at a time, on the engine's thread."""

    @property
    def info(self) -> ModelInfo:
        """The model: geometry, limits and defaults."""

    @property
    def runs_ahead(self) -> bool:
        """Whether it has a use for `StepPlan.ahead`."""

    def allocate(self, num_pages: int, layers_per_page: int) -> None:
        """Make the memory of the pages, in place of what was there before; no sequence may be known.

        Args:
            num_pages: that sequences can be granted, numbered from 0.
            layers_per_page: layers whose keys and values share a page.
        Raises:
            MemoryError, RuntimeError, torch.OutOfMemoryError: there is not as much memory.
        """

    def free_pages(self) -> None:
        """Give back the memory of the pages, so that what is left can be measured; no sequence may be known."""

    def warm_up(self, max_batch: int) -> None:
        """Make steps ready for up to `max_batch` rows, once the pages are allocated for good."""

    def load_adapter(self, name: str, folder: Path) -> AdapterInfo:
        """Read an adapter, which plans may name from then on; on any thread, while steps run.

        Args:
            name: that no loaded adapter has.
            folder: where it lies.
        Raises:
            AdapterError: it cannot be used with this model.
        """

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, and the images that were encoded with it; no sequence may have it."""

    def compile(self, constraint: Constraint) -> None:
        """Compile a constraint, so that it is at hand when a plan names it; on any thread, while steps run.

        Raises:
            InvalidRequest: it cannot be compiled, is too large, or no token satisfies it.
        """

    def watch(self, on_failure: Callable[[BaseException], None]) -> None:
        """Name who is told if the executor breaks while no step runs, or a step does not return for it.

        Args:
            on_failure: called with the cause, once, on any thread.
        """

    def close(self) -> None:
        """End what runs beside this process; nothing is asked of the executor any more."""

    def run(self, plan: StepPlan) -> StepResult:
        """Take one step. What goes wrong in one sequence is in the result and harms no other.

        Raises:
            Exception: the executor as a whole is broken, such as its device. It must not be used again.
        """
