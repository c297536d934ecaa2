"""TLS files: the server's certificate and key and its clients' authorities, renewed without a restart."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from trimserve.config import ServerConfig
from trimserve.errors import CredentialsError
from trimserve.server.reloaded import Reloaded

__all__ = ["Certificates", "read_certificates"]


@dataclass(frozen=True, slots=True)
class Certificates:
    """Contents of PEM files that OpenSSL accepts."""

    chain: bytes
    """The server's certificate chain."""
    key: bytes
    """Its unencrypted private key."""
    client_authorities: bytes | None
    """Authorities of client certificates, which are then required; None if clients need none."""


def read_certificates(config: ServerConfig) -> Reloaded[Certificates] | None:
    """The configured files, read again when they change; None without TLS.

    Args:
        config: names the files.
    Raises:
        CredentialsError: the files cannot be used.
    """
    certificate, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
    if certificate is None or key is None:
        return None
    paths = [path for path in (certificate, key, client_ca) if path]
    return Reloaded(paths, lambda: _read(certificate, key, client_ca))


def _read(certificate: Path, key: Path, client_ca: Path | None) -> Certificates:
    # Transports accept anything and fail at the handshake; OpenSSL says what is wrong.
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
        return Certificates(certificate.read_bytes(), key.read_bytes(), authorities)
    except OSError as error:
        raise CredentialsError(f"{client_ca} (--tls-client-ca) must be PEM certificates: {error}") from error
