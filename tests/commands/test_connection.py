"""What the options of a connection connect with: plaintext, a system's roots, own authorities, certificates, tokens."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.server.fakes import FakeRunner
from tests.server.test_access import entry
from tests.server.test_tls import Files, server_config
from trimserve.cli import app
from trimserve.config import Config
from trimserve.serve import make_server
from trimserve.server.running import InProcessServer


def with_server_knobs(config: Config, **knobs: object) -> Config:
    return config.model_copy(update={"server": config.server.model_copy(update=knobs)})


def generated(config: Config, *options: object) -> str:
    """What a server of these certificates answers, or why it does not."""
    with InProcessServer(make_server(FakeRunner(), config)) as fake:
        question = ("generate", "--prompt", "Hi", "--address", fake.address, *map(str, options))
        result = CliRunner().invoke(app, question)
    return result.stdout if result.exit_code == 0 else str(result.exception)


def test_a_server_of_an_authority_is_sent_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, clients = Files(tmp_path), tmp_path / "clients.toml"
    clients.write_text(entry("us", "secret"))
    guarded = with_server_knobs(server_config(files), auth_file=clients)
    monkeypatch.setenv("TRIMSERVE_TOKEN", "secret")
    assert generated(guarded, "--ca", files.path("clients.pem")) == "Hello ☃!\n"


def test_a_server_that_the_system_trusts_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(tmp_path)
    assert "cannot reach" in generated(server_config(files), "--tls")
    monkeypatch.setenv("SSL_CERT_FILE", str(files.path("clients.pem")))
    assert generated(server_config(files), "--tls") == "Hello ☃!\n"


def test_a_server_that_asks_for_a_certificate_is_shown_one(tmp_path: Path) -> None:
    files = Files(tmp_path)
    own = files.authority.issue_cert("a-client")
    own.private_key_pem.write_to_path(tmp_path / "own.key")
    own.cert_chain_pems[0].write_to_path(tmp_path / "own.pem")
    mutual = with_server_knobs(server_config(files), tls_client_ca=files.path("clients.pem"))
    trusted = ("--ca", files.path("clients.pem"))
    assert "cannot reach" in generated(mutual, *trusted)
    shown = ("--client-cert", tmp_path / "own.pem", "--client-key", tmp_path / "own.key")
    assert generated(mutual, *trusted, *shown) == "Hello ☃!\n"
