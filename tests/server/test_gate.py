"""The gate with plain values, as any transport uses it; tests/server/test_access.py asks it over gRPC."""

import hashlib
from pathlib import Path

import pytest

from trimserve.config import ServerConfig
from trimserve.errors import CredentialsError, PermissionDenied, TooManyCalls, Unauthenticated
from trimserve.server.gate import Gate
from trimserve.server.metrics import Metrics

SERVICES = ("ask", "watch")


def gate(tmp_path: Path, entry: str = "", **limits: int) -> Gate:
    """A gate with one client, `shop`, whose token is `secret`."""
    path = tmp_path / "clients.toml"
    path.write_text(f'[clients.shop]\ntoken_sha256 = ["{hashlib.sha256(b"secret").hexdigest()}"]\n{entry}')
    return Gate(ServerConfig.model_validate({"auth_file": path, **limits}), SERVICES, Metrics((), ()))


def test_without_tokens_a_client_goes_by_the_name_that_the_transport_has_for_it() -> None:
    with Gate(ServerConfig(), SERVICES, Metrics((), ())).admit("ask", {}, "10.0.0.1") as admission:
        assert admission.client == "10.0.0.1"


def test_with_tokens_a_client_goes_by_the_name_of_its_token(tmp_path: Path) -> None:
    with gate(tmp_path).admit("watch", {"x-api-key": "secret"}, "10.0.0.1") as admission:
        assert admission.client == "shop"


def test_a_client_without_a_token_is_refused_whatever_its_address(tmp_path: Path) -> None:
    with pytest.raises(Unauthenticated), gate(tmp_path).admit("ask", {}, "10.0.0.1"):
        pytest.fail("it must not be admitted")


def test_a_client_may_use_only_the_services_of_its_entry(tmp_path: Path) -> None:
    watcher = gate(tmp_path, 'services = ["watch"]')
    with (
        pytest.raises(PermissionDenied, match="shop may not use ask"),
        watcher.admit("ask", {"authorization": "Bearer secret"}, ""),
    ):
        pytest.fail("it must not be admitted")


def test_an_entry_with_a_service_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="must be among ask, watch, got draw"):
        gate(tmp_path, 'services = ["draw"]')


def test_a_place_is_free_again_once_its_call_has_ended() -> None:
    narrow = Gate(ServerConfig(max_concurrent_rpcs_per_client=1), SERVICES, Metrics((), ()))
    for _ in range(2):
        with (
            narrow.admit("ask", {}, "a"),
            narrow.admit("ask", {}, "b"),
            pytest.raises(TooManyCalls, match="a has 1 calls open"),
            narrow.admit("ask", {}, "a"),
        ):
            pytest.fail("it must not be admitted")
