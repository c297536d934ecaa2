"""Checkpoints of the Hugging Face hub: asked once, and briefly, before anything is tried again and again."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from trimserve.errors import CheckpointError

__all__ = ["snapshot"]

_PATIENCE_SECONDS = 5.0
"""For the hub to answer at all; without an answer only the cache is looked at."""


def snapshot(model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of a hub checkpoint in the cache, downloaded if it is not there.

    Args:
        model: hub id, or what was meant to be a folder.
        revision: branch, tag or commit; None is the main branch.
        patterns: of the files that are wanted.
    Raises:
        CheckpointError: no hub model has that name, it is gated, or the hub cannot be reached and the cache lacks it.
    """
    if model.count("/") > 1 or "\\" in model:  # no hub id has these: a folder was meant
        raise CheckpointError(f"{model}: no such folder")
    silence = _silence(model, revision)
    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=[*patterns], local_files_only=silence is not None
            )
        )
    except GatedRepoError:
        page = f"https://huggingface.co/{model}"
        why = f"the hub gives it to those who accepted its licence on {page}; then set HF_TOKEN, or run `hf auth login`"
        raise CheckpointError(f"{model}: {why}") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{model}: the hub has no revision {revision} of it") from None
    except RepositoryNotFoundError:
        why = "neither a folder nor a hub model; one that is private needs HF_TOKEN"
    except LocalEntryNotFoundError as error:
        why = f"neither a folder nor a hub model in the cache, and the hub does not answer: {silence or error}"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = f"neither a folder nor a hub model that can be had: {error}"
    raise CheckpointError(f"{model}: {why.partition(chr(10))[0]}")


def _silence(model: str, revision: str | None) -> Exception | None:
    """Why the hub does not answer; None if it does, were it with an error.

    `snapshot_download` takes half a minute to find that out.
    """
    try:
        HfApi().model_info(model, revision=revision, timeout=_PATIENCE_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return None
    except Exception as error:  # noqa: BLE001  # of the library that it speaks HTTP with, which changes
        return error
    return None
