"""What the server needs of a transport: the protocol that `grpc/server.py` satisfies."""

from typing import Protocol

__all__ = ["KEEPALIVE_SECONDS", "Transport"]

KEEPALIVE_SECONDS = 60.0
"""Without data, after which a client is asked for a sign of life; 20 seconds later, what it had open is cancelled."""


class Transport(Protocol):
    """One wire protocol on one port; used once, on one event loop."""

    @property
    def address(self) -> str:
        """`HOST:PORT`, once it listens."""

    async def listen(self) -> None:
        """Accept connections; health says NOT_SERVING.

        Raises:
            CredentialsError: the certificate files cannot be used.
            CannotListen: the port is taken, or the host is not ours.
        """

    def set_serving(self, is_serving: bool) -> None:
        """Change what health says."""

    async def close(self, grace_seconds: float) -> None:
        """Stop listening and close; also if it never listened.

        Args:
            grace_seconds: for the last messages of open calls.
        """
