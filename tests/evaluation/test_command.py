"""`trimserve eval` from end to end on a random checkpoint, and the options it refuses."""

import json
import sys
from itertools import product
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from tests.model.adapters import CONFIGS, save_adapter
from tests.server.test_access import entry
from tests.server.test_tls import Files, server_config
from trimserve.cli import app
from trimserve.config import Config, ModelConfig
from trimserve.evaluation.report import Report
from trimserve.serve import make_runner, make_server
from trimserve.server.running import InProcessServer
from trimserve.trimming.policies.table import POLICIES

AVAILABLE = [name for name, policy in POLICIES.items() if not policy.knob]
"""Policies of a model without guide and codebook."""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_a_curve_is_written_and_told(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--policies", "trimmed, strided", "--k-ratios", "0.2,1", "--merge-ratios", "0,0.1", "--limit", 4)
    result = run("--data", data, "--out", tmp_path / "out", "--model", checkpoint, *options)
    assert result.exit_code == 0, result.output
    report = Report.from_json((tmp_path / "out/report.json").read_text())
    assert (tmp_path / "out/curves.png").stat().st_size > 10_000
    assert report.data["num_questions"] == 4
    assert {row.kind for row in report.rows} == {"all", "short", "long"}
    untrimmed, *_ = rows = [row for row in report.rows if row.kind == "all"]
    assert [(row.policy, row.merge_ratio, row.k_ratio) for row in rows] == [
        ("untrimmed", 0.0, 1.0),
        *product(("trimmed", "strided"), (0.0, 0.1), (0.2, 1.0)),
    ]
    for row in rows:
        if row.k_ratio == 1:
            assert row.kept_fraction == 1
            assert row.divergence.value == 0
            assert row.accuracy == untrimmed.accuracy
        else:
            assert row.kept_fraction < 1
            assert row.divergence.value > 0
    assert "strided" in result.output


def test_all_policies_are_compared_at_equal_counts(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--policies", "all", "--keep", "0.2,0.5", "--limit", 2)
    result = run("--data", data, "--out", tmp_path, "--model", checkpoint, *options)
    assert result.exit_code == 0, result.output
    report = Report.from_json((tmp_path / "report.json").read_text())
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    rows = [row for row in report.rows if row.kind == "all" and row.policy != "untrimmed"]
    controlled = [name for name in AVAILABLE if POLICIES[name].budgets]
    assert {(row.policy, row.keep) for row in rows} == {*product(controlled, (0.2, 0.5)), ("pool", None)}
    for share in (0.2, 0.5):
        assert len({row.kept_fraction for row in rows if row.keep == share}) == 1
    gains = [(gain.policy, gain.over, gain.keep) for gain in report.advantages if gain.kind == "all"]
    rivals = [name for name in controlled if name != "random"]
    assert sorted(gains) == sorted(("random", *rival) for rival in product(rivals, (0.2, 0.5)))


def test_the_server_that_is_asked_may_speak_tls_and_want_a_token(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, clients = Files(tmp_path), tmp_path / "clients.toml"
    clients.write_text(entry("us", "secret"))
    server_section = server_config(files).server.model_copy(update={"auth_file": clients})
    config = Config(model=ModelConfig(model=str(checkpoint)), server=server_section)
    options = ("--policies", "strided", "--k-ratios", "0.2", "--limit", 1, "--ca", files.path("clients.pem"))
    with InProcessServer(make_server(make_runner(config), config)) as server:
        asked = ("--data", data, "--out", tmp_path / "out", "--address", server.address, *options)
        refused = run(*asked)
        monkeypatch.setenv("TRIMSERVE_TOKEN", "secret")
        answered = run(*asked)
    assert isinstance(refused.exception, grpc.RpcError)
    assert refused.exception.code() is grpc.StatusCode.UNAUTHENTICATED
    assert answered.exit_code == 0, answered.output
    report = Report.from_json((tmp_path / "out/report.json").read_text())
    assert "a server" in report.model["through"]


def test_the_report_names_the_adapter_that_answered(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", checkpoint, CONFIGS["text"])
    options = ("--policies", "strided", "--k-ratios", "0.2", "--limit", 1, "--adapter", f"mine={folder}")
    result = run("--data", data, "--out", tmp_path / "out", "--model", checkpoint, *options)
    assert result.exit_code == 0, result.output
    assert Report.from_json((tmp_path / "out/report.json").read_text()).model["adapter"] == str(folder)


def test_calibration_is_written_and_told(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--calibrate", "--max-kl", 0.5)
    result = run("--data", data, "--out", tmp_path, "--model", checkpoint, *options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert f"{found['k_ratio']:.2f}" in result.output
    passing = [probe for probe in found["probes"] if probe["divergence"] <= 0.5]
    assert min([1.0, *(probe["k_ratio"] for probe in passing)]) == found["k_ratio"]


def test_parameters_most_like_untrimmed_are_written_and_can_be_compared(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    asked = ("--data", data, "--out", tmp_path, "--model", checkpoint, "--keep", "0.3", "--limit", 2)
    result = run(*asked, "--policies", "vflowopt", "--calibrate")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "calibration.json").read_text())
    best = max(found["probes"], key=lambda probe: probe["similarity"])
    assert best["parameters"] == found["parameters"]
    assert -1 <= best["similarity"] < 1
    policy = ":".join(["vflowopt", *(f"{name}={value}" for name, value in found["parameters"].items())])
    result = run(*asked, "--policies", f"random,vflowopt,{policy}")
    assert result.exit_code == 0, result.output
    report = Report.from_json((tmp_path / "report.json").read_text())
    rows = {json.dumps(row.parameters): row for row in report.rows if (row.policy, row.kind) == ("vflowopt", "all")}
    assert rows.keys() == {"{}", json.dumps(found["parameters"])}
    assert [gain.parameters for gain in report.advantages if gain.kind == "all"] == [{}, found["parameters"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--k-ratios", "0.5,0"), "must be numbers in (0, 1], got '0'"),
        (("--merge-ratios", "0,1.5"), "must be numbers in [0, 1], got '1.5'"),
        (("--k-ratios", "half"), "must be numbers in (0, 1], got 'half'"),
        (("--policies", "trimmed,best"), f"must be among {', '.join(AVAILABLE)}, got 'best'"),
        (("--keep", "0,0.5"), "must be numbers in (0, 1], got '0'"),
        (("--policies", "trimmed,cls"), "cls chooses before any head looks: use --keep"),
        (("--policies", "cls:rows=1", "--keep", "0.5"), "must be a parameter of cls (layer, num_layers), got 'rows'"),
        (("--policies", "cls:layer=1.5", "--keep", "0.5"), "layer must be a whole number in [0, 1000], got '1.5'"),
        (("--policies", "mmr:relevance_weight=2"), "relevance_weight must be a number in [0, 1], got '2'"),
        (("--policies", "gprune:temperature=0", "--keep", "0.5"), "must be a number in (0, 10], got '0'"),
        (("--calibrate", "--policies", "fastv", "--keep", "0.5"), "fastv has no parameters to be found"),
        (("--address", "localhost:1"), "--address excludes --model"),
        (("--adapter", "mine"), "must be NAME=FOLDER without --address, and NAME with it"),
    ],
)
def test_bad_options_are_refused_before_anything_is_asked(
    data: Path, checkpoint: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = run("--data", data, "--out", tmp_path / "out", "--model", checkpoint, *options)
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert message in said
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_extra_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trimserve.evaluation.picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    result = run("--data", data, "--out", tmp_path)
    assert result.exit_code == 2
    assert "trimserve[eval]" in result.output
