"""From TLS files to an SSL context that follows them: the next handshake has the newest certificate."""

import os
import ssl

from trimserve.config import ServerConfig
from trimserve.server.certificates import Certificates, read_certificates
from trimserve.server.metrics import Metrics

__all__ = ["server_context"]


def server_context(config: ServerConfig, metrics: Metrics) -> ssl.SSLContext | None:
    """A context for the HTTP port; None without TLS.

    Open connections keep the certificate that they began with. Files that cannot be used change nothing until they can.

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
    newest = first = _context(in_use)

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context_of: ssl.SSLContext) -> None:
        """Called at each handshake, also without a server name."""
        nonlocal in_use, newest
        if (current := files.get()) is not in_use:
            in_use, newest = current, _context(current)
        connection.context = newest

    first.sni_callback = choose
    return first


def _context(files: Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    # OpenSSL reads certificates from files only; this one is in memory, so what was checked is what is used.
    descriptor = os.memfd_create("trimserve-tls")
    try:
        os.write(descriptor, files.key + b"\n" + files.chain)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password="")
    finally:
        os.close(descriptor)
    if files.client_authorities is not None:
        context.load_verify_locations(cadata=files.client_authorities.decode("ascii", errors="ignore"))
        context.verify_mode = ssl.CERT_REQUIRED
    return context
