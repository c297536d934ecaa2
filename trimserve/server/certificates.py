"""TLS: the server's certificate and the authorities of its clients, renewed without a restart."""

import ssl
from pathlib import Path

import grpc

from trimserve.config import ServerConfig
from trimserve.errors import CredentialsError
from trimserve.server.reloaded import Reloaded

__all__ = ["server_credentials"]

Pem = grpc.ServerCertificateConfiguration


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """What the gRPC port proves itself with; None without TLS.

    Connections that are open keep the certificate that they began with. Files that cannot be used, such as a
    certificate that is newer than its key, change nothing until they can.

    Args:
        config: names the files.
    Raises:
        CredentialsError: the files cannot be used.
    """
    certificate, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
    if certificate is None or key is None:
        return None
    files = Reloaded(
        [path for path in (certificate, key, client_ca) if path], lambda: _read(certificate, key, client_ca)
    )
    sent = files.get()

    def fetch() -> Pem:
        """What the next handshake takes; None when it is what the last one took."""
        nonlocal sent
        if (pem := files.get()) is sent:
            return None  # type: ignore[return-value]  # as gRPC documents it
        sent = pem
        return pem

    return grpc.dynamic_ssl_server_credentials(sent, fetch, require_client_authentication=client_ca is not None)


def _read(certificate: Path, key: Path, client_ca: Path | None) -> Pem:
    # gRPC takes anything and fails at the handshakes; OpenSSL tells what is wrong.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        files = f"{certificate} (--tls-cert) and {key} (--tls-key)"
        raise CredentialsError(f"{files} must be a PEM certificate chain and its unencrypted key: {error}") from error
    try:
        authorities = None
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            authorities = client_ca.read_bytes()
        return grpc.ssl_server_certificate_configuration([(key.read_bytes(), certificate.read_bytes())], authorities)
    except OSError as error:
        raise CredentialsError(f"{client_ca} (--tls-client-ca) must be PEM certificates: {error}") from error
