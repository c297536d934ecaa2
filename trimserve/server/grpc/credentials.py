"""From TLS files to gRPC's server credentials."""

import grpc

from trimserve.config import ServerConfig
from trimserve.server.certificates import Certificates, read_certificates
from trimserve.server.metrics import Metrics

__all__ = ["server_credentials"]

Pem = grpc.ServerCertificateConfiguration


def server_credentials(config: ServerConfig, metrics: Metrics) -> grpc.ServerCredentials | None:
    """Credentials for the gRPC port; None without TLS.

    Open connections keep the certificate that they began with. Files that cannot be used, such as a certificate that
    is newer than its key, change nothing until they can.

    Args:
        config: names the files.
        metrics: tells when certificates end, and of failures to read them again.
    Raises:
        CredentialsError: the files cannot be used.
    """
    files = read_certificates(config, metrics)
    if files is None:
        return None
    in_use = files.get()

    def fetch() -> Pem:
        """The certificates of the next handshake; None if they have not changed."""
        nonlocal in_use
        if (current := files.get()) is in_use:
            return None  # type: ignore[return-value]  # as gRPC documents it
        in_use = current
        return _pem(current)

    is_mutual = in_use.client_authorities is not None
    return grpc.dynamic_ssl_server_credentials(_pem(in_use), fetch, require_client_authentication=is_mutual)


def _pem(files: Certificates) -> Pem:
    return grpc.ssl_server_certificate_configuration([(files.key, files.chain)], files.client_authorities)
