"""Admission of calls before they are read: who calls, whether they may, and whether there is room for one more.

Whatever a caller takes is counted here first, for every transport: calls, health watches, bytes of messages, and what a
client may have in a minute. `docs/security.md` lists it all.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from trimserve.config import ServerConfig
from trimserve.errors import PermissionDenied, TooManyCalls, Unauthenticated
from trimserve.loopback import is_loopback
from trimserve.server.admission import Admission
from trimserve.server.message_bytes import MessageBytes
from trimserve.server.metrics import Metrics
from trimserve.server.rates import Rates
from trimserve.server.tokens import Caller, Tokens

__all__ = ["MAX_WATCHES", "MAX_WATCHES_PER_ADDRESS", "Gate"]

MESSAGES_IN_FLIGHT = 16
"""Messages of the largest size that there is room for while they arrive or wait for their images to be decoded."""

MAX_WATCHES = 256
"""Health watches that are open at once without being somebody's calls."""

MAX_WATCHES_PER_ADDRESS = 16
"""Of one address: clients that follow the health of a server keep one for each connection."""

Metadata = Mapping[str, str | bytes]


class Gate:
    """Admits calls and counts the open ones; belongs to the event loop's thread."""

    def __init__(
        self,
        config: ServerConfig,
        services: Collection[str],
        metrics: Metrics,
        granted_by_name: Collection[str] = (),
        rates: Rates | None = None,
    ) -> None:
        """Read who may call.

        Args:
            config: token file, limits, and where the server listens.
            services: full names of the services that the token file may grant.
            metrics: shows what callers hold, and failures to read the file again.
            granted_by_name: those of them that only its naming them grants; without a token file they are for clients
                on loopback.
            rates: allowances of clients; None is by the real clock.
        Raises:
            CredentialsError: the file cannot be used.
        """
        unnamed = frozenset(services) - frozenset(granted_by_name)
        self._tokens = None if config.auth_file is None else Tokens(config.auth_file, services, metrics, unnamed)
        self._closed = frozenset() if is_loopback(config.host) else frozenset(granted_by_name)
        """Services that nobody may use unless there is a token file."""
        self._services = frozenset(services)
        self._rates = rates or Rates()
        self._max_rpcs = config.max_concurrent_rpcs
        self._max_rpcs_per_client = config.max_concurrent_rpcs_per_client
        self._open: Counter[str] = Counter()
        self._watches: Counter[str] = Counter()
        self._watching_connections: set[str] = set()
        self.message_bytes = MessageBytes(MESSAGES_IN_FLIGHT * config.max_message_bytes, config.max_message_bytes)
        """Room for messages, of all calls."""
        metrics.health_watches.set_function(lambda: self.num_watches)
        metrics.message_bytes_in_flight.set_function(lambda: self.message_bytes.in_flight)

    @property
    def num_watches(self) -> int:
        """Health watches that are open without being somebody's calls."""
        return self._watches.total()

    def identify(self, metadata: Metadata, peer: str) -> Caller:
        """Who calls, whatever it calls.

        Args:
            metadata: of the call, with lower-case keys.
            peer: what the transport calls the client: the name in its certificate, else its address.
        Raises:
            Unauthenticated: it has no token, or an unknown one.
        """
        if self._tokens is None:
            return Caller(peer, self._services)
        return self._tokens.caller(metadata)

    def known(self, metadata: Metadata, peer: str) -> Caller | None:
        """The same, or None for somebody unknown."""
        try:
            return self.identify(metadata, peer)
        except Unauthenticated:
            return None

    @contextmanager
    def admit(self, service: str | None, metadata: Metadata, peer: str) -> Iterator[Admission]:
        """Hold a place for a call.

        Args:
            service: full name of the called service; None is one that every client may use.
            metadata: as `identify` takes it.
            peer: as `identify` takes it.
        Raises:
            Unauthenticated: it has no token, or an unknown one.
            PermissionDenied: the client, or without a token file nobody, may use the service.
            TooManyCalls: the server, or this client, has as many open calls as it may.
            TooFast: the client has used up an allowance.
        """
        caller = self.identify(metadata, peer)
        if self._tokens is None and service in self._closed:
            raise PermissionDenied(f"{service} needs auth_file on a server that listens beyond loopback")
        if service is not None:
            caller.check(service)
        with self._place(caller.name):
            self._rates.check(caller)
            self._rates.spend(caller, "requests_per_minute", 1)
            with Admission(caller, self._rates) as admission:
                yield admission

    @contextmanager
    def _place(self, client: str) -> Iterator[None]:
        if self._open.total() >= self._max_rpcs:
            raise TooManyCalls("server", "max_concurrent_rpcs", self._max_rpcs)
        if self._max_rpcs_per_client is not None and self._open[client] >= self._max_rpcs_per_client:
            raise TooManyCalls(client, "max_concurrent_rpcs_per_client", self._max_rpcs_per_client)
        with _counted(self._open, client):
            yield

    @contextmanager
    def watch(self, address: str, connection: str | None) -> Iterator[None]:
        """Hold a place for a health watch.

        Args:
            address: of the client.
            connection: what the transport calls the connection, which then may have one watch; None is any number.
        Raises:
            TooManyCalls: the server, the address or the connection has as many watches as it may.
        """
        if self._watches.total() >= MAX_WATCHES:
            raise TooManyCalls("server", "not configurable", MAX_WATCHES, "health watches")
        if self._watches[address] >= MAX_WATCHES_PER_ADDRESS:
            raise TooManyCalls(address, "not configurable", MAX_WATCHES_PER_ADDRESS, "health watches")
        if connection in self._watching_connections:
            raise TooManyCalls(connection or "", "more take a token", 1, "health watches")
        if connection is not None:
            self._watching_connections.add(connection)
        try:
            with _counted(self._watches, address):
                yield
        finally:
            self._watching_connections.discard(connection or "")


@contextmanager
def _counted(open_calls: Counter[str], key: str) -> Iterator[None]:
    """Count one more during the block, and keep no names of clients that have gone."""
    open_calls[key] += 1
    try:
        yield
    finally:
        open_calls[key] -= 1
        if not open_calls[key]:
            del open_calls[key]
