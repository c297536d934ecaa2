"""The command line as people type it, against a server and with one of its own."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from skimage import data
from typer.testing import CliRunner, Result

from trimserve.cli import app, in_process_server, main
from trimserve.config import Config
from trimserve.models.loading import embedded_model_folder

SAMPLES = sorted((embedded_model_folder().parent / "samples").glob("*.png"))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server of the embedded model."""
    with in_process_server() as server:
        yield server.address


@pytest.fixture(scope="module", params=["astronaut", "coffee"])
def photo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph, which the embedded model has never seen the like of."""
    file = tmp_path_factory.mktemp("photos") / f"{request.param}.jpg"
    Image.fromarray(getattr(data, request.param)()).save(file)
    return file


def run(*arguments: object) -> Result:
    """What a command prints; it must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_generate_and_explain_take_every_shipped_sample(sample: Path, address: str, tmp_path: Path) -> None:
    question = ("--image", sample, "--prompt", "What do you see?", "--address", address)
    answer = json.loads(run("generate", *question, "--json").stdout)
    assert answer["usage"]["images"][0]["valid_features"] > 0
    picture = tmp_path / "deep" / "explain.png"
    run("explain", *question, "--out", picture)
    with Image.open(picture) as drawn:
        assert drawn.width >= 600


def test_generate_and_explain_take_a_photo(photo: Path, address: str, tmp_path: Path) -> None:
    question = ("--image", photo, "--prompt", "What do you see?", "--address", address)
    assert json.loads(run("generate", *question, "--json", "--no-trim").stdout)["usage"]
    run("explain", *question, "--out", tmp_path / "explain.png", "--k-ratio", 0.1)
    assert (tmp_path / "explain.png").exists()


def test_generate_without_an_address_serves_itself_and_streams_the_same_text() -> None:
    question = ("generate", "--image", SAMPLES[0], "--prompt", "What do you see?", "--temperature", 0)
    assert run(*question).stdout == run(*question, "--stream").stdout


def test_streamed_json_is_one_event_a_line(address: str) -> None:
    lines = run("generate", "--prompt", "Hi", "--stream", "--json", "--address", address).stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert "started" in events[0]
    assert "finished" in events[-1]


def test_info_tells_versions_ops_and_geometry() -> None:
    about = json.loads(run("info", "--json").stdout)
    assert about["ops"] == ["gather_kv", "headwise_scores", "headwise_topk", "union_indices"]
    assert about["extension"]["version"] == about["trimserve"]
    assert about["model"]["cross_kv_bytes_per_feature"] == (
        about["model"]["num_cross_attention_layers"] * about["model"]["kv_bytes_per_position"]
    )


def test_serve_has_an_option_for_every_knob() -> None:
    help_text = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["serve", "--help"]).output
    for section in Config.model_fields:
        for knob in type(getattr(Config(), section)).model_fields:
            assert f"--{knob.replace('_', '-')} " in help_text, knob


def test_a_knob_out_of_range_is_named_with_its_bound() -> None:
    result = CliRunner().invoke(app, ["serve", "--max-batch", "0"])
    assert result.exit_code == 2
    assert "--max-batch" in result.output
    assert "greater than or equal to 1" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "x", "--image", "no/such/file.png"], "no/such/file.png"),
        (["generate", "--prompt", "x", "--model", "no/such/model"], "no/such/model"),
        (["generate", "--prompt", "x", "--k-ratio", "2"], "trim.k_ratio: must be in (0, 1], got 2.0"),
        (["generate", "--prompt", "x", "--address", "127.0.0.1:1"], "UNAVAILABLE"),
    ],
)
def test_what_the_user_can_mend_is_one_message_and_status_1(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("sys.argv", ["trimserve", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
