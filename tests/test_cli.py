"""The command line as people type it, against a server and with one of its own."""

import json
import math
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from PIL import Image
from skimage import data
from typer.testing import CliRunner, Result

from tests.forked import forked
from tests.server.fakes import CONFIG, FINISHED, STARTED, FakeRunner
from trimserve import __version__
from trimserve.api.chunks import TokenDelta
from trimserve.cli import app, main
from trimserve.config import Config, EngineConfig
from trimserve.model.loading import embedded_model_folder
from trimserve.serve import in_process_server, make_server
from trimserve.server.running import InProcessServer
from trimserve.trimming.policies.table import POLICIES

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


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    """What a command prints; it must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
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


def test_another_policy_with_a_budget_is_asked_by_its_name(address: str, tmp_path: Path) -> None:
    question = ("--image", SAMPLES[0], "--prompt", "?", "--address", address, "--merge-ratio", 0)
    asked = (*question, "--policy", "cls", "--keep", 0.3)
    told = run("explain", *asked, "--out", tmp_path / "explain.png").stderr
    [usage] = json.loads(run("generate", *asked, "--json").stdout)["usage"]["images"]
    assert usage["kept_features"] == math.ceil(0.3 * usage["valid_features"])
    assert f"kept {usage['kept_features']} of {usage['valid_features']} features (" in told


def test_policies_are_explained_side_by_side_at_equal_counts(address: str, tmp_path: Path) -> None:
    question = ("--image", SAMPLES[0], "--prompt", "?", "--address", address, "--merge-ratio", 0)
    told = run("explain", *question, "--policies", "all", "--keep", 0.3, "--out", tmp_path / "sheet.png").stderr
    shares = {line.split(": ")[0]: line.split("(")[1].split(")")[0] for line in told.splitlines()}
    assert shares.keys() == {name for name, policy in POLICIES.items() if not policy.knob}
    assert len({share for name, share in shares.items() if name != "pool"}) == 1
    with Image.open(tmp_path / "sheet.png") as drawn:
        assert drawn.width == 1200
    told = run("explain", *question, "--policies", "cls, fastv", "--out", tmp_path / "sheet.png").stderr
    assert [line.split(": ")[0] for line in told.splitlines()] == ["cls", "fastv"]
    refused = CliRunner().invoke(app, [*map(str, ("explain", *question, "--policies", "all", "--policy", "cls"))])
    assert refused.exit_code == 2
    assert "--policies excludes --policy" in refused.output


@pytest.mark.parametrize(("ending", "format_"), [("png", "PNG"), ("JPG", "JPEG"), ("webp", "WEBP")])
def test_a_picture_is_of_the_kind_that_its_ending_says(address: str, tmp_path: Path, ending: str, format_: str) -> None:
    picture = tmp_path / f"explain.{ending}"
    run("explain", "--image", SAMPLES[0], "--prompt", "?", "--address", address, "--out", picture)
    with Image.open(picture) as drawn:
        assert drawn.format == format_


def test_an_answer_of_any_text_is_printed_as_it_is(tmp_path: Path) -> None:
    answer = "[/INST] [bold]" + "x" * 200
    config = CONFIG.model_copy(update={"engine": EngineConfig()})
    with InProcessServer(make_server(FakeRunner((STARTED, TokenDelta(answer, (1,)), FINISHED)), config)) as fake:
        question = ("--image", SAMPLES[0], "--prompt", "[/x]", "--address", fake.address)
        for command in (("explain", "--out", tmp_path / "explain.png"), ("generate",), ("generate", "--stream")):
            assert run(*command, *question).stdout == f"{answer}\n"


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
    assert about["ops"] == [
        "attention",
        "decode_layers",
        "gather_kv",
        "headwise_scores",
        "headwise_topk",
        "linear",
        "paged_attention",
        "rms_norm",
        "rotate",
        "rotate_write_kv",
        "select_features",
        "silu_gate",
        "union_indices",
        "write_kv",
    ]
    assert about["extension"]["version"] == about["trimserve"]
    assert about["model"]["cross_kv_bytes_per_feature"] == (
        about["model"]["num_cross_attention_layers"] * about["model"]["kv_bytes_per_position"]
    )


def test_info_reads_no_weights_and_takes_the_knobs_of_a_model(tmp_path: Path) -> None:
    for file in embedded_model_folder().glob("*.json"):
        shutil.copy(file, tmp_path)
    about = json.loads(run("info", "--json", "--model", tmp_path, "--dtype", "bfloat16", "--max-model-len", 99).stdout)
    assert (about["model"]["dtype"], about["model"]["max_model_len"]) == ("bfloat16", 99)
    assert about["model"]["num_parameters"] > 0


def options(command: str) -> dict[str, str | None]:
    """The options of a command, by their names in Python, and their environment variables."""
    group = typer.main.get_command(app)
    return {each.name: each.envvar for each in group.commands[command].params}  # type: ignore[attr-defined]  # a group


def test_serve_has_an_option_and_a_variable_for_every_knob() -> None:
    expected = {
        knob: f"TRIMSERVE__{section}__{knob}".upper()
        for section in Config.model_fields
        for knob in type(getattr(Config(), section)).model_fields
    }
    assert options("serve").items() >= expected.items()


@pytest.mark.parametrize("command", ["generate", "explain", "info"])
def test_commands_that_load_a_model_take_its_knobs(command: str) -> None:
    assert options(command).keys() >= {"model", "revision", "dtype", "quantize", "max_model_len"}
    for knob in ("k_ratio", "merge_ratio"):  # options of the request in the commands that make one
        own = options(command)[knob]
        assert own == (f"TRIMSERVE__MODEL__{knob.upper()}" if command == "info" else None)


def test_the_version_is_told() -> None:
    assert run("--version").stdout == f"trimserve {__version__}\n"


def test_help_waits_for_no_slow_import() -> None:
    program = "import sys, trimserve.cli; print({'torch', 'transformers', 'numpy', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_without_a_command_the_help_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["trimserve"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr()
    assert "Commands" in printed.out
    assert not printed.err


def test_prompt_and_image_are_read_from_standard_input(address: str, tmp_path: Path) -> None:
    question = ("generate", "--address", address, "--image")
    wanted = run(*question, SAMPLES[0], "--prompt", "What do you see?").stdout
    assert run(*question, SAMPLES[0], "--prompt", "-", stdin=b"What do you see?\n").stdout == wanted
    content = SAMPLES[0].read_bytes()
    assert run(*question, "-", "--prompt", "What do you see?", stdin=content).stdout == wanted
    run("explain", *question[1:], "-", "--prompt", "?", "--out", tmp_path / "explain.png", stdin=content)


def test_several_images_are_shown_in_their_order(address: str) -> None:
    images = [argument for sample in SAMPLES[:3] for argument in ("--image", sample)]
    answer = json.loads(run("generate", *images, "--prompt", "?", "--address", address, "--json").stdout)
    assert len(answer["usage"]["images"]) == 3


def test_a_second_look_is_told_with_its_region(address: str) -> None:
    question = ("generate", "--image", SAMPLES[0], "--prompt", "?", "--address", address, "--json")
    answer = json.loads(run(*question, "--look-again", 0.25).stdout)
    assert (answer["looked_at"]["height"], answer["looked_at"]["width"]) == (0.25, 0.25)
    assert len(answer["usage"]["images"]) == 2
    assert "looked_at" not in json.loads(run(*question).stdout)


@pytest.mark.parametrize("command", ["generate", "chat", "explain"])
def test_help_lists_every_policy_with_a_line(command: str) -> None:
    listed = " ".join(run(command, "--help").stdout.split())
    for name, policy in POLICIES.items():
        assert f"{name}: {policy.describe().summary}" in listed


def test_info_of_a_server_has_the_fields_of_info_here(address: str) -> None:
    here, there = (json.loads(run("info", "--json", *option).stdout) for option in ((), ("--address", address)))
    assert there["address"] == address
    for name in ("num_parameters", "weight_bytes", "dtype", "revision", "max_tiles", "tensor_parallel"):
        assert there["model"][name] == here["model"][name]
    for option in ((), ("--address", address)):
        told = run("info", *option).stdout
        assert f"{here['model']['num_parameters']:,} parameters" in told
        assert len(told.splitlines()) < 30


def test_status_tells_load_and_memory() -> None:
    with InProcessServer(make_server(FakeRunner(), CONFIG)) as fake:
        told = run("status", "--address", fake.address).stdout
        document = json.loads(run("status", "--address", fake.address, "--json").stdout)
    for fact in ("ready", "2 waiting of at most 64", "3.3 KiB of 9.8 KiB", "33% less than untrimmed", "66 hits"):
        assert fact in told
    assert document["num_waiting"] == 2


def test_an_address_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        options = ("serve", "--log-level", "error", "--port", port)
        with forked("from trimserve.cli import main; main()", *options, stderr=subprocess.PIPE) as process:
            [line] = process.rest().splitlines()
    assert process.returncode == 1
    assert line.startswith(f"error: cannot listen on 127.0.0.1:{port} (--host, --port): Address already in use")


LOADING = """
import sys, time
from trimserve import cli, serve

def load_model(*_):
    print("loading", flush=True)
    time.sleep(1000)

serve.load_model = load_model
sys.argv = ["trimserve", "generate", "--prompt", "x"]
cli.main()
"""


def test_an_interrupt_while_the_model_is_loaded_ends_the_command() -> None:
    with forked(LOADING, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        error = process.rest()
    assert process.returncode == 130
    assert error == "interrupted\n"
