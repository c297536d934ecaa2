"""The models that are measured, and how their requests are trimmed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from benchmarks.bench_model import max_kept_fraction, write_bench_model
from trimserve.model.loading import embedded_model_folder
from trimserve.v1 import generation_pb2 as pb

__all__ = ["MODELS", "ModelName", "UnderTest", "under_test"]

ModelName = Literal["embedded", "bench"]
"""`embedded` is trained and tiny; `bench` has random weights and real image geometry (`bench_model.py`)."""

MODELS: Final[tuple[ModelName, ...]] = ("embedded", "bench")


@dataclass(frozen=True, slots=True)
class UnderTest:
    """A model, and how it is trimmed."""

    name: ModelName
    folder: Path | None
    """Of the checkpoint; None is the embedded model."""
    max_kept_fraction: float | None
    """Cap of every trimmed request; None: none."""

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint, of the embedded model too."""
        return self.folder or embedded_model_folder()

    def trim(self, *, is_on: bool) -> pb.TrimOptions:
        """What a request says: the checkpoint's own budget, or off."""
        if not is_on:
            return pb.TrimOptions(mode=pb.TRIM_MODE_OFF)
        return pb.TrimOptions(mode=pb.TRIM_MODE_ON, max_kept_fraction=self.max_kept_fraction)


def under_test(name: ModelName, bench_model: Path) -> UnderTest:
    """One of `MODELS`.

    Args:
        name: which.
        bench_model: folder of `bench`, which is written if it is not there.
    """
    if name == "embedded":
        return UnderTest(name, None, None)
    if not (bench_model / "config.json").exists():
        write_bench_model(bench_model)
    return UnderTest(name, bench_model, max_kept_fraction())
