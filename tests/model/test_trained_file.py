"""What a policy has learned on its way to a file and back, and the files that are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.fake_model import FakeModel
from tests.trimming.policies.trained import drawn_modules
from trimserve.api.info import ModelInfo
from trimserve.errors import CheckpointError
from trimserve.model.trained_file import Progress, load_trained, load_trained_files, save_trained, shape_of
from trimserve.trimming.policies.quecc import QueCCRows

INFO = replace(
    FakeModel().info,
    model_id="some",
    revision="cafe",
    hidden_size=4,
    features_per_tile=10,
    num_cross_attention_layers=3,
    device="cpu",
)
TRAINED = drawn_modules(shape_of(INFO, 5))


def write(file: Path, method: str = "quecc") -> Path:
    save_trained(file, method, TRAINED[method], INFO, "inputs", [Progress(0, 1.5), Progress(9, 0.5)], {"seed": 0})
    return file


@pytest.mark.parametrize("method", TRAINED)
def test_weights_are_read_as_they_were_written_and_equal_ones_are_equal_files(tmp_path: Path, method: str) -> None:
    files = [write(tmp_path / name, method) for name in ("one", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()
    read = load_trained(files[0], replace(INFO, model_id="moved"), "inputs").state_dict()
    written = TRAINED[method].state_dict()
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in written)


@pytest.mark.parametrize(
    ("info", "features", "message"),
    [
        (replace(INFO, revision="beef"), "inputs", "trained for some with model_revision cafe, the model has beef"),
        (INFO, "outputs", "trained for some with intermediate_features inputs, the model has outputs"),
        (replace(INFO, hidden_size=5), "inputs", "width must be 5, got 4"),
        (replace(INFO, features_per_tile=17), "inputs", r"kernel must be \[16, 64\] for 5 rows, got \[9, 64\]"),
    ],
)
def test_what_was_trained_for_another_model_is_refused(
    tmp_path: Path, info: ModelInfo, features: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"compressor .*file: .*{message}"):
        load_trained(write(tmp_path / "file"), info, features)


def changed(file: Path, **changes: object) -> None:
    """Write the file again with another card or other tensors."""
    tensors = load_file(file)
    card = {
        "model_id": "some",
        "model_revision": "cafe",
        "intermediate_features": "inputs",
        "method": "quecc",
        "rows": 5,
        "width": 4,
    }
    for name, value in changes.items():
        if isinstance(value, torch.Tensor):
            tensors[name.replace("__", ".")] = value
        else:
            card[name] = value
    save_file(tensors, file, {"trimserve": json.dumps(card)})


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("wico", {"method": "wico", "rows": 3}, r"joined.weight must be \[64, 24\] for 3 rows, got \[64, 16\]"),
        ("quecc", {"rows": 99}, r"rows must be in \[2, 10\], got 99"),
        ("quecc", {"method": "trimmed"}, "method must be among exit, .*, got 'trimmed'"),
        ("quecc", {"query__bias": torch.full((64,), torch.nan)}, "query.bias must be finite"),
        ("quecc", {"more": torch.zeros(1)}, r"more must be None for 5 rows, got \[1\]"),
    ],
)
def test_other_rows_and_weights_that_are_not_finite_are_refused(
    tmp_path: Path, method: str, changes: dict[str, object], message: str
) -> None:
    file = write(tmp_path / "file", method)
    changed(file, **changes)
    with pytest.raises(CheckpointError, match=f"compressor .*file: .*{message}"):
        load_trained(file, INFO, "inputs")


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_trained(tmp_path / "none", INFO, "inputs")
    content = write(tmp_path / "file").read_bytes()
    for length in (4, len(content) // 2, len(content) - 1):
        (tmp_path / "truncated").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"compressor .*truncated: cannot be read"):
            load_trained(tmp_path / "truncated", INFO, "inputs")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="not one; `trimserve train-compressor`"):
        load_trained(tmp_path / "weights", INFO, "inputs")


def test_two_files_for_one_policy_are_refused(tmp_path: Path) -> None:
    files = [write(tmp_path / "one"), write(tmp_path / "other"), write(tmp_path / "wico", "wico")]
    assert isinstance(load_trained_files(files[1:], INFO, "inputs")["quecc"], QueCCRows)
    with pytest.raises(CheckpointError, match=r"compressor .*one: another file is for quecc, too"):
        load_trained_files(files, INFO, "inputs")
