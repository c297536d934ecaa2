"""Admission of calls before they are read: who calls, whether they may, and whether there is room for one more."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from trimserve.config import ServerConfig
from trimserve.errors import PermissionDenied, TooManyCalls
from trimserve.loopback import is_loopback
from trimserve.server.metrics import Metrics
from trimserve.server.tokens import Tokens

__all__ = ["Gate"]


class Gate:
    """Admits calls and counts the open ones; belongs to the event loop's thread."""

    def __init__(
        self,
        config: ServerConfig,
        services: Collection[str],
        metrics: Metrics,
        granted_by_name: Collection[str] = (),
    ) -> None:
        """Read who may call.

        Args:
            config: token file, limits, and where the server listens.
            services: full names of the services that the token file may grant.
            metrics: tells of failures to read the file again.
            granted_by_name: those of them that only its naming them grants; without a token file they are for clients
                on loopback.
        Raises:
            CredentialsError: the file cannot be used.
        """
        unnamed = frozenset(services) - frozenset(granted_by_name)
        self._tokens = None if config.auth_file is None else Tokens(config.auth_file, services, metrics, unnamed)
        self._closed = frozenset() if is_loopback(config.host) else frozenset(granted_by_name)
        """Services that nobody may use unless there is a token file."""
        self._max_rpcs = config.max_concurrent_rpcs
        self._max_rpcs_per_client = config.max_concurrent_rpcs_per_client
        self._open: Counter[str] = Counter()

    def identify(self, metadata: Mapping[str, str | bytes]) -> None:
        """Check that a call comes from a known client, whatever it calls.

        Args:
            metadata: of the call, with lower-case keys.
        Raises:
            Unauthenticated: it has no token, or an unknown one.
        """
        if self._tokens is not None:
            self._tokens.caller(metadata)

    @contextmanager
    def admit(self, service: str, metadata: Mapping[str, str | bytes], peer: str) -> Iterator[str]:
        """Hold a place for a call.

        Args:
            service: full name of the called service.
            metadata: of the call, with lower-case keys.
            peer: what the transport calls the client: the name in its certificate, else its address.
        Yields:
            The client's name: that of its token, or `peer` if no tokens are configured.
        Raises:
            Unauthenticated: it has no token, or an unknown one.
            PermissionDenied: the client, or without a token file nobody, may use the service.
            TooManyCalls: the server, or this client, has as many open calls as it may.
        """
        client = self._client(service, metadata, peer)
        if self._open.total() >= self._max_rpcs:
            raise TooManyCalls("server", "max_concurrent_rpcs", self._max_rpcs)
        if self._max_rpcs_per_client is not None and self._open[client] >= self._max_rpcs_per_client:
            raise TooManyCalls(client, "max_concurrent_rpcs_per_client", self._max_rpcs_per_client)
        self._open[client] += 1
        try:
            yield client
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]

    def _client(self, service: str, metadata: Mapping[str, str | bytes], peer: str) -> str:
        if self._tokens is None:
            if service in self._closed:
                raise PermissionDenied(f"{service} needs auth_file on a server that listens beyond loopback")
            return peer
        caller = self._tokens.caller(metadata)
        caller.check(service)
        return caller.name
