"""A codebook on its way to a file and back, and the files that are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.engine.fake_model import FakeModel
from trimserve.errors import CheckpointError
from trimserve.model.codebook import load_codebook, save_codebook

INFO = replace(FakeModel().info, model_id="some", revision="cafe", hidden_size=4)
PROTOTYPES = torch.eye(3, 4)


def test_a_codebook_is_read_as_it_was_written_and_equal_ones_are_equal_files(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "other"]
    for file in files:
        save_codebook(file, PROTOTYPES, INFO, "inputs")
    assert torch.equal(load_codebook(files[0], replace(INFO, model_id="moved"), "inputs"), PROTOTYPES)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("revision", "width", "features", "message"),
    [
        ("beef", 4, "inputs", "built for some with model_revision beef, the model has cafe"),
        ("cafe", 4, "outputs", "built for some with intermediate_features outputs, the model has inputs"),
        ("cafe", 5, "inputs", r"must be \[P, 4\], got \[3, 5\]"),
    ],
)
def test_a_codebook_of_another_model_is_refused(
    tmp_path: Path, revision: str, width: int, features: str, message: str
) -> None:
    file = tmp_path / "codebook.safetensors"
    save_codebook(file, torch.eye(3, width), replace(INFO, revision=revision), features)
    with pytest.raises(CheckpointError, match=f"codebook .*codebook.safetensors: .*{message}"):
        load_codebook(file, INFO, "inputs")


def test_a_codebook_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "codebook.safetensors"
    save_codebook(file, PROTOTYPES / 0, INFO, "inputs")
    with pytest.raises(CheckpointError, match=r"codebook\.safetensors: prototypes must be finite"):
        load_codebook(file, INFO, "inputs")


def test_files_that_are_no_codebook_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_codebook(tmp_path / "none", INFO, "inputs")
    (tmp_path / "text").write_text("not safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_codebook(tmp_path / "text", INFO, "inputs")
    save_file({"weight": PROTOTYPES}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="not one; `trimserve codebook build`"):
        load_codebook(tmp_path / "weights", INFO, "inputs")
