"""What is no folder is looked for on the hub, without waiting for a hub that does not answer."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from trimserve.errors import CheckpointError
from trimserve.model import hub


class Hub:
    """Stands for the hub: answers, or does not, and remembers the downloads."""

    def __init__(self, *, silence: Exception | None = None, refusal: Exception | None = None) -> None:
        """Answer everything, but for an error of the connection, or of the download."""
        self.silence = silence
        self.refusal = refusal
        self.downloads: list[dict[str, Any]] = []

    def model_info(self, *_: Any, **__: Any) -> None:
        if self.silence is not None:
            raise self.silence

    def download(self, model: str, **options: Any) -> str:
        self.downloads.append({"model": model, **options})
        if self.refusal is not None:
            raise self.refusal
        return "/cache/snapshot"


def install(fake: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(HfApi, "model_info", fake.model_info)
    monkeypatch.setattr(hub, "snapshot_download", fake.download)
    return fake


def response_error(kind: type[Exception]) -> Exception:
    """An error of the hub, whose constructors need a response of its HTTP library."""
    error = kind.__new__(kind)
    error.args = ("401 Client Error.\n\nCannot access it.",)
    return error


def test_a_model_of_the_hub_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(Hub(), monkeypatch)
    assert hub.snapshot("meta/llama", "v1", ["*.json"]) == Path("/cache/snapshot")
    [download] = fake.downloads
    assert download == {
        "model": "meta/llama",
        "revision": "v1",
        "allow_patterns": ["*.json"],
        "local_files_only": False,
    }


def test_a_hub_that_does_not_answer_is_not_asked_again_and_the_cache_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = install(Hub(silence=TimeoutError("no route")), monkeypatch)
    assert hub.snapshot("meta/llama", None, []) == Path("/cache/snapshot")
    assert fake.downloads[0]["local_files_only"]
    fake.refusal = LocalEntryNotFoundError("not there\nat all")
    with pytest.raises(CheckpointError) as refused:
        hub.snapshot("meta/llama", None, [])
    assert str(refused.value) == (
        "meta/llama: neither a folder nor a hub model in the cache, and the hub does not answer: no route"
    )


@pytest.mark.parametrize("path", ["models/llama/mine", r"models\llama"])
def test_a_path_is_no_hub_id(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(Hub(), monkeypatch)
    with pytest.raises(CheckpointError, match="no such folder"):
        hub.snapshot(path, None, [])
    assert not fake.downloads


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            GatedRepoError,
            "meta/llama: the hub gives it to those who accepted its licence on https://huggingface.co/meta",
        ),
        (RepositoryNotFoundError, "meta/llama: neither a folder nor a hub model; one that is private needs HF_TOKEN"),
        (OSError, "meta/llama: neither a folder nor a hub model that can be had: 401 Client Error."),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(
    kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Hub(refusal=response_error(kind)), monkeypatch)
    with pytest.raises(CheckpointError) as refused:
        hub.snapshot("meta/llama", None, [])
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
