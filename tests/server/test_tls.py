"""TLS on a real port: who may connect, and certificates that are renewed while the server runs."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from tests.patience import soon, until
from tests.server.fakes import CHUNKS, FakeRunner, Pause, chat_request
from trimserve.config import Config, ServerConfig
from trimserve.errors import CredentialsError
from trimserve.serve import make_server
from trimserve.server.grpc.responses import fold
from trimserve.server.lifecycle import Server
from trimserve.server.running import running_server
from trimserve.v1 import generation_pb2_grpc

DAY = timedelta(days=1)
YESTERDAY, TOMORROW = datetime.now(UTC) - DAY, datetime.now(UTC) + DAY

FAILURES = "trimserve_credential_reload_failures_total"


def expiry(server: Server) -> float | None:
    """When the certificate in use ends, as the metrics say."""
    name = "trimserve_tls_certificate_expiry_timestamp_seconds"
    return server.metrics.registry.get_sample_value(name, {"certificate": "server"})


def expired_authority() -> bytes:
    """The certificate of an authority that ended yesterday; trustme's own never end."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an old authority")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), YESTERDAY - DAY, YESTERDAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


class Files:
    """A server's certificate and key as files, issued by an authority of their own."""

    def __init__(self, folder: Path) -> None:
        """Write them."""
        self.folder = folder
        self.renew()

    def renew(
        self,
        authority: trustme.CA | None = None,
        not_after: datetime | None = None,
        not_before: datetime | None = None,
    ) -> None:
        """Write a new certificate and key."""
        self.authority = authority or trustme.CA()
        names = "localhost", "127.0.0.1"
        self.issued = self.authority.issue_cert(*names, not_after=not_after, not_before=not_before)
        self.path("server.pem").write_bytes(self.chain)
        self.path("server.key").write_bytes(self.issued.private_key_pem.bytes())
        self.path("clients.pem").write_bytes(self.ca)

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def ca(self) -> bytes:
        return self.authority.cert_pem.bytes()

    @property
    def chain(self) -> bytes:
        return b"".join(blob.bytes() for blob in self.issued.cert_chain_pems)

    def client(self, authority: trustme.CA | None = None, not_after: datetime | None = None) -> grpc.ChannelCredentials:
        """What a client with a certificate of its own connects with."""
        own = (authority or self.authority).issue_cert("a-client", not_after=not_after)
        chain = b"".join(blob.bytes() for blob in own.cert_chain_pems)
        return grpc.ssl_channel_credentials(self.ca, own.private_key_pem.bytes(), chain)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def server_config(files: Files, *, is_mutual: bool = False) -> Config:
    client_ca = files.path("clients.pem") if is_mutual else None
    cert, key = files.path("server.pem"), files.path("server.key")
    return Config(server=ServerConfig(port=0, metrics_port=0, tls_cert=cert, tls_key=key, tls_client_ca=client_ca))


@asynccontextmanager
async def stub_of(
    address: str, credentials: grpc.ChannelCredentials
) -> AsyncIterator["generation_pb2_grpc.GenerationServiceAsyncStub"]:
    """A stub on a connection of its own: gRPC shares connections between channels otherwise."""
    async with grpc.aio.secure_channel(address, credentials, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)


async def ask(address: str, credentials: grpc.ChannelCredentials) -> grpc.StatusCode:
    """How one call on a new connection ends."""
    async with stub_of(address, credentials) as stub:
        try:
            assert (await stub.Generate(chat_request(), timeout=60)).text == "Hello ☃!"
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def test_only_who_trusts_the_server_and_speaks_tls_is_answered(files: Files) -> None:
    async with running_server(make_server(FakeRunner(), server_config(files))) as server:
        assert await ask(server.address, grpc.ssl_channel_credentials(files.ca)) is grpc.StatusCode.OK
        stranger = trustme.CA().cert_pem.bytes()
        assert await ask(server.address, grpc.ssl_channel_credentials(stranger)) is grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.insecure_channel(server.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generation_pb2_grpc.GenerationServiceStub(channel).Generate(chat_request())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_with_client_authorities_only_their_valid_certificates_are_answered(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trimserve")
    async with running_server(make_server(FakeRunner(), server_config(files, is_mutual=True))) as server:
        for credentials, expected in (
            (files.client(), grpc.StatusCode.OK),
            (grpc.ssl_channel_credentials(files.ca), grpc.StatusCode.UNAVAILABLE),
            (files.client(trustme.CA()), grpc.StatusCode.UNAVAILABLE),
            (files.client(not_after=YESTERDAY), grpc.StatusCode.UNAVAILABLE),
        ):
            assert await ask(server.address, credentials) is expected
    assert [record.__dict__["client"] for record in caplog.records if record.message == "rpc"] == ["a-client"]


@pytest.mark.parametrize(
    ("begin", "end", "why"),
    [
        (None, YESTERDAY, "certificate has expired"),
        (TOMORROW, TOMORROW + DAY, "certificate is not yet valid"),
    ],
)
async def test_a_certificate_that_is_not_valid_now_is_refused_at_start(
    files: Files, begin: datetime | None, end: datetime, why: str
) -> None:
    files.renew(not_after=end, not_before=begin)
    with pytest.raises(CredentialsError, match=rf"server\.pem \(--tls-cert\) is refused by clients: {why}"):
        async with running_server(make_server(FakeRunner(), server_config(files))):
            pytest.fail("it must not serve")


async def test_authorities_of_which_none_is_valid_now_are_refused_at_start(files: Files) -> None:
    expired = expired_authority()
    files.path("clients.pem").write_bytes(expired)
    with pytest.raises(CredentialsError, match=r"clients\.pem \(--tls-client-ca\) must have a certificate that"):
        async with running_server(make_server(FakeRunner(), server_config(files, is_mutual=True))):
            pytest.fail("it must not serve")
    files.path("clients.pem").write_bytes(expired + files.ca)  # beside the authority that replaced it
    async with running_server(make_server(FakeRunner(), server_config(files, is_mutual=True))) as server:
        assert await ask(server.address, files.client()) is grpc.StatusCode.OK


async def test_an_expired_certificate_replaces_none_that_is_valid(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_server(make_server(FakeRunner(), server_config(files))) as server:
        credentials = grpc.ssl_channel_credentials(files.ca)
        valid_until = expiry(server)
        files.renew(files.authority, not_after=YESTERDAY)
        assert await ask(server.address, credentials) is grpc.StatusCode.OK
        assert expiry(server) == valid_until
        assert server.metrics.registry.get_sample_value(FAILURES, {"kind": "certificates"})
        files.renew(files.authority, not_after=TOMORROW)
        assert await ask(server.address, credentials) is grpc.StatusCode.OK
        assert expiry(server) == int(TOMORROW.timestamp())
    complaints = [record.__dict__["why"] for record in caplog.records if record.message == "credentials not reloaded"]
    assert all("certificate has expired" in why for why in complaints[-1:])


async def test_a_renewed_certificate_serves_new_connections_while_old_ones_go_on(files: Files) -> None:
    runner = FakeRunner((CHUNKS[0], Pause.UNTIL_RELEASED, *CHUNKS[1:]))
    async with running_server(make_server(runner, server_config(files))) as server:
        old = grpc.ssl_channel_credentials(files.ca)
        async with stub_of(server.address, old) as stub:
            stream = stub.GenerateStream(chat_request())
            await soon(runner.paused.wait())
            files.renew()
            runner.released.set()
            assert await ask(server.address, grpc.ssl_channel_credentials(files.ca)) is grpc.StatusCode.OK
            assert await ask(server.address, old) is grpc.StatusCode.UNAVAILABLE
            assert (await fold(stream)).text == "Hello ☃!"


async def test_a_half_written_renewal_changes_nothing(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    async with running_server(make_server(FakeRunner(), server_config(files))) as server:
        credentials = grpc.ssl_channel_credentials(files.ca)
        files.path("server.pem").write_bytes(trustme.CA().issue_cert("localhost").cert_chain_pems[0].bytes())
        for _ in range(2):
            assert await ask(server.address, credentials) is grpc.StatusCode.OK
        files.path("server.key").unlink()
        assert await ask(server.address, credentials) is grpc.StatusCode.OK
    complaints = [record.__dict__["why"] for record in caplog.records if record.message == "credentials not reloaded"]
    assert len(complaints) == 2  # once for each change
    assert all("--tls-cert" in why for why in complaints)


async def test_certificates_renewed_under_load_fail_no_call(files: Files) -> None:
    authority = files.authority
    credentials = grpc.ssl_channel_credentials(files.ca)
    is_over = asyncio.Event()
    codes: list[grpc.StatusCode] = []

    async def load() -> None:
        while not is_over.is_set():
            codes.append(await ask(server.address, credentials))

    async with running_server(make_server(FakeRunner(), server_config(files))) as server:
        clients = [asyncio.create_task(load()) for _ in range(4)]
        for _ in range(8):
            num_before = len(codes)
            await asyncio.to_thread(files.renew, authority)
            await until(lambda wanted=num_before + 2: len(codes) >= wanted)  # type: ignore[misc]  # a default binds
        is_over.set()
        await asyncio.gather(*clients)
    assert set(codes) == {grpc.StatusCode.OK}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("server.pem", b"", r"server\.pem \(--tls-cert\) and .*server\.key \(--tls-key\) must be"),
        ("server.key", b"no key", "must be a PEM certificate chain and its unencrypted key"),
        ("clients.pem", b"no certificates", r"clients\.pem \(--tls-client-ca\) must be PEM certificates"),
        ("clients.pem", None, r"clients\.pem \(--tls-client-ca\)"),
    ],
)
async def test_files_that_cannot_be_used_are_refused_at_start(
    files: Files, name: str, content: bytes | None, message: str
) -> None:
    files.path(name).unlink()
    if content is not None:
        files.path(name).write_bytes(content)
    with pytest.raises(CredentialsError, match=message):
        async with running_server(make_server(FakeRunner(), server_config(files, is_mutual=True))):
            pytest.fail("it must not serve")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "serving.example"])
def test_plaintext_beyond_loopback_takes_a_flag(files: Files, host: str) -> None:
    with pytest.raises(ValidationError, match="allow_plaintext"):
        ServerConfig(host=host)
    assert ServerConfig(host=host, allow_plaintext=True)
    assert ServerConfig(host=host, tls_cert=files.path("server.pem"), tls_key=files.path("server.key"))


async def test_with_the_flag_plaintext_is_answered_beyond_loopback() -> None:
    config = Config(server=ServerConfig(host="0.0.0.0", port=0, metrics_port=0, allow_plaintext=True))
    async with running_server(make_server(FakeRunner(), config)) as server:
        port = server.address.rpartition(":")[2]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: generation_pb2_grpc.GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(channel)
            assert (await stub.Generate(chat_request(), timeout=60)).text == "Hello ☃!"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_takes_plaintext(host: str) -> None:
    assert not ServerConfig(host=host).allow_plaintext


def test_a_certificate_needs_its_key_and_client_authorities_a_certificate(files: Files) -> None:
    path = files.path("server.pem")
    for knobs in ({"tls_cert": path}, {"tls_key": path}, {"tls_client_ca": path}):
        with pytest.raises(ValidationError, match="tls_cert"):
            ServerConfig.model_validate(knobs)
