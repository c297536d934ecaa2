"""TLS files: the server's certificate and key and its clients' authorities, renewed without a restart."""

import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trimserve.config import ServerConfig
from trimserve.errors import CredentialsError
from trimserve.server.metrics import Metrics
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
    ends: Mapping[str, float]
    """When a certificate ends, in seconds since 1970: `server`, and the first of the `client_authorities`."""


def read_certificates(config: ServerConfig, metrics: Metrics) -> Reloaded[Certificates] | None:
    """The configured files, read again when they change; None without TLS.

    Args:
        config: names the files.
        metrics: tells when certificates end, and of failures to read them again.
    Raises:
        CredentialsError: the files cannot be used, or clients would refuse the certificate, as one that has expired.
    """
    certificate, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
    if certificate is None or key is None:
        return None
    paths = [path for path in (certificate, key, client_ca) if path]

    def read() -> Certificates:
        """All files at once, whose ends the metrics tell."""
        files = _read(certificate, key, client_ca)
        for name, end in files.ends.items():
            metrics.certificate_expiry.labels(name).set(end)
        return files

    return Reloaded("certificates", paths, read, metrics)


def _read(certificate: Path, key: Path, client_ca: Path | None) -> Certificates:
    # Transports accept anything and fail at the handshake; OpenSSL says what is wrong.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        chain, key_content = certificate.read_bytes(), key.read_bytes()
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        files = f"{certificate} (--tls-cert) and {key} (--tls-key)"
        raise CredentialsError(f"{files} must be a PEM certificate chain and its unencrypted key: {error}") from error
    try:
        ends = {"server": _end_of_server(context, chain)}
    except ssl.SSLError as error:
        why = getattr(error, "verify_message", "") or error
        raise CredentialsError(f"{certificate} (--tls-cert) is refused by clients: {why}") from error
    if client_ca is None:
        return Certificates(chain, key_content, None, ends)
    try:
        authorities = client_ca.read_bytes()
        context.load_verify_locations(cadata=authorities.decode("ascii", errors="ignore"))
    except (OSError, ValueError) as error:
        raise CredentialsError(f"{client_ca} (--tls-client-ca) must be PEM certificates: {error}") from error
    ends |= _end_of_authorities(context, client_ca)
    return Certificates(chain, key_content, authorities, ends)


def _end_of_server(context: ssl.SSLContext, chain: bytes) -> float:
    """Shake hands in memory with a client that trusts what is in the file: OpenSSL checks the dates and all else."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False  # names are the client's business
    trusting.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    trusting.load_verify_locations(cadata=chain.decode("ascii", errors="ignore"))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(down, up)
    server = context.wrap_bio(up, down, server_side=True)
    for side in (client, server, client):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    found = client.getpeercert() or {}
    return ssl.cert_time_to_seconds(str(found["notAfter"]))


def _end_of_authorities(context: ssl.SSLContext, path: Path) -> dict[str, float]:
    """When the first of those that are valid now ends; nothing if none is an authority, as OpenSSL sees it."""
    spans = [
        (ssl.cert_time_to_seconds(str(each["notBefore"])), ssl.cert_time_to_seconds(str(each["notAfter"])))
        for each in context.get_ca_certs()
    ]
    valid = [end for begin, end in spans if begin <= time.time() < end]
    if spans and not valid:
        raise CredentialsError(f"{path} (--tls-client-ca) must have a certificate that is valid now, got none")
    return {"client_authorities": min(valid)} if valid else {}
