"""`trimserve train-compressor`: files, resuming, and what is refused."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from trimserve.cli import app
from trimserve.config import EngineConfig, ModelConfig
from trimserve.distillation import train as training
from trimserve.errors import CheckpointError
from trimserve.evaluation.report import Report
from trimserve.model.loading import describe_model
from trimserve.model.trained_file import load_trained


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train-compressor", *map(str, arguments)])


@pytest.fixture(scope="session")
def asked(data: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Options of a small training that share a cache."""
    cache = tmp_path_factory.mktemp("cache") / "lessons"
    return "--data", data, "--model", checkpoint, "--batch", 2, "--steps", 6, "--cache", cache


@pytest.mark.parametrize(("method", "rows"), [("quecc", 5), ("wico", 3), ("exit", 0)])
def test_an_interrupted_training_ends_with_the_same_file(
    asked: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, rows: int
) -> None:
    monkeypatch.setattr(training, "_SAVED_EVERY", 2)
    options = (*asked, "--method", method, "--rows", rows)
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    assert run(*options, "--out", whole).exit_code == 0
    step = training._step
    taken: list[object] = []

    def interrupt(*arguments: object) -> None:
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(arguments)
        step(*arguments)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(training, "_step", interrupt)
    assert run(*options, "--out", resumed).exit_code != 0
    assert resumed.with_name("resumed.safetensors.state").exists()
    assert not resumed.exists()
    other = run(*options, "--seed", 1, "--out", resumed)
    assert isinstance(other.exception, CheckpointError)
    assert "was begun with seed 0, is to go on with 1; remove it to begin anew" in str(other.exception)
    taken.clear()
    assert run(*options, "--out", resumed).exit_code == 0
    assert len(taken) == 2
    assert resumed.read_bytes() == whole.read_bytes()
    assert not resumed.with_name("resumed.safetensors.state").exists()


def test_what_was_trained_is_served_and_compared(
    asked: tuple[object, ...], data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tokenpacker.safetensors"
    assert run(*asked, "--method", "tokenpacker", "--rows", 5, "--out", file).exit_code == 0
    info = describe_model(ModelConfig(model=str(checkpoint), compressor=(file,)), EngineConfig())
    assert load_trained(file, info, "inputs").shape.rows == 5
    assert [each.name for each in info.policy_details if each.knob == "compressor" and each.is_available] == [
        "tokenpacker"
    ]
    options = ("--data", data, "--model", checkpoint, "--compressor", file, "--out", tmp_path)
    compared = CliRunner().invoke(
        app, [*map(str, ("eval", *options, "--policies", "tokenpacker,pool", "--keep", "0.5"))]
    )
    assert compared.exit_code == 0, compared.output
    rows = Report.from_json((tmp_path / "report.json").read_text()).rows
    assert {row.kept_fraction for row in rows if row.policy == "tokenpacker" and row.kind == "all"} == {0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "trimmed", "--rows", 5), "--method: must be among exit, tokenpacker"),
        (("--method", "quecc"), "--rows: must be in [2, 10], got 0"),
        (("--method", "wico", "--rows", 8), "--rows: must be 1 + a * b with a and b at most 3, got 8"),
        (("--method", "exit", "--rows", 3), "--rows: must be 0"),
        (("--method", "quecc", "--rows", 5, "--batch", 4), "--batch: must be at most 3"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    asked: tuple[object, ...], tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    result = run(*asked, "--out", tmp_path / "file", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split()).replace("'", ""), result.output


def test_a_cache_of_other_data_is_refused(asked: tuple[object, ...], data: Path, tmp_path: Path) -> None:
    assert run(*asked, "--method", "quecc", "--rows", 5, "--out", tmp_path / "file").exit_code == 0
    folder = tmp_path / "data"
    shutil.copytree(data.parent, folder)
    lines = (folder / data.name).read_text().splitlines()
    (folder / data.name).write_text("\n".join(lines[:-1]))
    result = run(*asked, "--data", folder / data.name, "--method", "quecc", "--rows", 5, "--out", tmp_path / "file")
    assert "must have" in str(result.exception)
    assert "has data" in str(result.exception)
