"""Files that are read again: what fails is tried again, and told."""

from pathlib import Path

import pytest

from trimserve.errors import CredentialsError
from trimserve.server.metrics import Metrics
from trimserve.server.reloaded import RETRY_SECONDS, Reloaded

KIND = {"kind": "tokens"}


class Clock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        """Begin at 0."""
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Source:
    """A file whose reading can be made to fail."""

    def __init__(self, path: Path) -> None:
        """Write it."""
        self.path = path
        self.error: Exception | None = None
        self.num_readings = 0
        self.write("old")

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def read(self) -> str:
        self.num_readings += 1
        if self.error is not None:
            raise CredentialsError("cannot be used") from self.error
        return self.path.read_text()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "file")


@pytest.fixture
def metrics() -> Metrics:
    return Metrics((), ())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reloaded(source: Source, metrics: Metrics, clock: Clock) -> Reloaded[str]:
    return Reloaded("tokens", [source.path], source.read, metrics, clock)


def test_a_file_that_could_not_be_opened_is_read_at_the_next_look_though_it_did_not_change(
    source: Source, reloaded: Reloaded[str]
) -> None:
    source.write("newer")
    source.error = OSError(24, "Too many open files")
    assert reloaded.get() == "old"
    source.error = None
    assert reloaded.get() == "newer"


def test_content_that_cannot_be_used_is_tried_again_after_a_second_though_it_did_not_change(
    source: Source, reloaded: Reloaded[str], clock: Clock
) -> None:
    source.write("newer")
    source.error = ValueError("not yet valid")
    assert reloaded.get() == reloaded.get() == "old"
    assert source.num_readings == 2
    source.error = None
    assert reloaded.get() == "old"
    clock.now = RETRY_SECONDS
    assert reloaded.get() == "newer"


def test_failures_and_the_last_success_are_told(
    source: Source, reloaded: Reloaded[str], metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    def value(name: str) -> float:
        found = metrics.registry.get_sample_value(f"trimserve_{name}", KIND)
        assert found is not None
        return found

    first = value("credentials_loaded_timestamp_seconds")
    source.write("newer")
    source.error = OSError(24, "Too many open files")
    for _ in range(3):
        reloaded.get()
    assert value("credential_reload_failures_total") == 3
    assert value("credentials_loaded_timestamp_seconds") == first
    assert [record.message for record in caplog.records] == ["credentials not reloaded"]  # once for a change
    source.error = None
    reloaded.get()
    assert value("credentials_loaded_timestamp_seconds") > first


def test_a_scrape_looks_for_changes_too(source: Source, reloaded: Reloaded[str], metrics: Metrics) -> None:
    source.write("newer")
    metrics.refresh(None)
    assert source.num_readings == 2
    assert reloaded.get() == "newer"
    assert source.num_readings == 2
