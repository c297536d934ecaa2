"""One call that was let in, and what it takes: the bytes of its message, tokens, a priority."""

from contextvars import ContextVar
from types import TracebackType

from trimserve.api.chunks import GenerationChunk, Started, TokenDelta
from trimserve.errors import InvalidRequest
from trimserve.server.message_bytes import Hold
from trimserve.server.rates import Rates
from trimserve.server.tokens import Caller

__all__ = ["Admission", "current_admission"]


class Admission:
    """One call that was let in, and what it takes."""

    def __init__(self, caller: Caller, rates: Rates) -> None:
        """Made by `Gate.admit`."""
        self.caller = caller
        self._rates = rates
        self._hold: Hold | None = None

    def __enter__(self) -> "Admission":
        """`current_admission` returns it during the block."""
        self._before = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give back what it took."""
        _current.reset(self._before)
        self.release_message()

    @property
    def client(self) -> str:
        """The name of its client: that of its token, or what the transport calls it if no tokens are configured."""
        return self.caller.name

    @property
    def held_bytes(self) -> int:
        """Of its message."""
        return 0 if self._hold is None else self._hold.num_bytes

    def holds(self, hold: Hold) -> None:
        """Room was found for its message; until the call ends, or `release_message`."""
        self._hold = hold

    def received(self, num_bytes: int) -> None:
        """Its message is there, and this large."""
        self._rates.spend(self.caller, "bytes_per_minute", num_bytes)
        if self._hold is not None:
            self._hold.shrink(num_bytes)

    def release_message(self) -> None:
        """Nothing refers to its message any more."""
        if self._hold is not None:
            self._hold.shrink(0)

    def saw(self, chunk: GenerationChunk) -> None:
        """Count the tokens of its answer, and let go of its message once its images are with the engine."""
        match chunk:
            case TokenDelta():
                self._rates.spend(self.caller, "tokens_per_minute", len(chunk.token_ids))
            case Started():
                num_passes = 1 if chunk.looked_at is None else 2
                self._rates.spend(self.caller, "tokens_per_minute", num_passes * chunk.num_prompt_tokens)
                self.release_message()

    def check_priority(self, priority: int) -> None:
        """Check that its client may ask for a priority.

        Raises:
            InvalidRequest: it may not.
        """
        if priority > self.caller.max_priority:
            most = f"{self.caller.max_priority} for client {self.client} (max_priority in the server's auth_file)"
            raise InvalidRequest("priority", f"must be at most {most}, got {priority}")


_current: ContextVar[Admission] = ContextVar("trimserve_admission")


def current_admission() -> Admission:
    """That of the call that is being answered."""
    return _current.get()
