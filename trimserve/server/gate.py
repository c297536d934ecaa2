"""Before a call is read: who calls, whether they may, and whether there is room for one more of theirs."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from grpc.aio import ServicerContext

from trimserve.config import ServerConfig
from trimserve.errors import TooManyCalls
from trimserve.server.tokens import Tokens

__all__ = ["Gate"]

Context = ServicerContext[Any, Any]


class Gate:
    """Lets calls in and counts those that are; belongs to the event loop."""

    def __init__(self, config: ServerConfig) -> None:
        """Read who may call.

        Args:
            config: file of tokens, limits.
        Raises:
            CredentialsError: the file cannot be used.
        """
        self._tokens = None if config.auth_file is None else Tokens(config.auth_file)
        self._max_rpcs = config.max_concurrent_rpcs
        self._max_rpcs_per_client = config.max_concurrent_rpcs_per_client
        self._open: Counter[str] = Counter()

    def identify(self, metadata: Mapping[str, str | bytes]) -> None:
        """Check that a call comes from a client, whatever it calls.

        Args:
            metadata: of the call.
        Raises:
            Unauthenticated: it has no token, or nobody's.
        """
        if self._tokens is not None:
            self._tokens.caller(metadata)

    @contextmanager
    def admit(self, service: str, context: Context) -> Iterator[str]:
        """Hold a place for a call.

        Args:
            service: full name of what is called.
            context: of the call.
        Yields:
            Who calls: the name of its token, else the name in its certificate, else its address.
        Raises:
            Unauthenticated: it has no token, or nobody's.
            PermissionDenied: the client may not use the service.
            TooManyCalls: the server, or this client, has as many calls open as it may.
        """
        client = self._client(service, context)
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

    def _client(self, service: str, context: Context) -> str:
        if self._tokens is not None:
            caller = self._tokens.caller(dict(context.invocation_metadata() or ()))
            caller.check(service)
            return caller.name
        if identities := context.peer_identities():
            return min(identities).decode(errors="replace")
        return context.peer().rpartition(":")[0]
