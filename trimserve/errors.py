"""Every error that trimserve raises on purpose.

    TrimserveError
    ├── InvalidRequest     the caller can fix it: names the field, the bound and what was got
    ├── MessageTooLarge    a message, or what it unpacks to, has more bytes than may be sent
    ├── UnknownMethod      an RPC that this version does not have
    ├── UnknownService     health is asked of a service that this version does not have
    ├── Unauthenticated    no token, or nobody's
    ├── PermissionDenied   a client that may not use this service
    ├── EngineBusy         the queue is full: try again later
    │   ├── OutOfMemory    no memory for this request now
    │   ├── TooManyCalls   the server, or one client, has as many calls open as it may
    │   ├── TooManyBytes   messages of others take all the room there is for them
    │   └── TooFast        a client asks for more in a minute than it may
    ├── EngineStopped      starting, draining or dead: another replica may serve it
    │   └── RankFailed     a process that shares the model with others failed: the engine ends, whatever it was doing
    ├── DeadlinePassed     the request's deadline came before its end
    │   └── MessageLate    its message did not arrive in time
    ├── RequestFailed      this request failed inside the model; others are not affected
    ├── CheckpointError    a checkpoint that cannot be served as it is: refused at load time
    │   └── AdapterError   the same of an adapter: refused at load time, or when it is loaded by an RPC
    ├── UnknownAdapter     no adapter of that name is loaded
    ├── AdapterExists      an adapter of that name is loaded already
    ├── CredentialsError   files of certificates or tokens that cannot be used: refused at start
    └── CannotListen       a port is taken, or the host is not ours: refused at start

`server/grpc/statuses.py` has the one table from these to gRPC's codes, `server/http/statuses.py` the one to HTTP's.
This file knows nothing about either.
"""

__all__ = [
    "AdapterError",
    "AdapterExists",
    "CannotListen",
    "CheckpointError",
    "CredentialsError",
    "DeadlinePassed",
    "EngineBusy",
    "EngineStopped",
    "InvalidRequest",
    "MessageLate",
    "MessageTooLarge",
    "OutOfMemory",
    "PermissionDenied",
    "RankFailed",
    "RequestFailed",
    "TooFast",
    "TooManyBytes",
    "TooManyCalls",
    "TrimserveError",
    "Unauthenticated",
    "UnknownAdapter",
    "UnknownMethod",
    "UnknownService",
]


_MAX_LOGGED_CHARS = 100


class TrimserveError(Exception):
    """Root of the tree; never raised itself."""

    reason: str = "UNSPECIFIED"
    """Stable upper-snake-case word for machines, sent as `ErrorInfo.reason`."""

    @property
    def log_fields(self) -> dict[str, str]:
        """What logs tell of it: not its text, which may quote the request."""
        return {"reason": self.reason}


class InvalidRequest(TrimserveError):
    """The request breaks a documented bound; nothing was computed for it."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, message: str) -> None:
        """Name what is wrong and where.

        Args:
            field: path of the field in `GenerateRequest`, such as `trim.k_ratio` or `chat.messages[1].parts[0].image`.
            message: what was expected and what was got, such as `must be in (0, 1], got 1.5`.
        """
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    @property
    def log_fields(self) -> dict[str, str]:
        """Also where it is, within bounds: a client chooses what it calls a field that nobody knows."""
        return {"reason": self.reason, "field": self.field[:_MAX_LOGGED_CHARS]}


class MessageTooLarge(TrimserveError):
    """A message has, or would unpack to, more bytes than it may have; names the bound."""

    reason = "MESSAGE_TOO_LARGE"


class UnknownMethod(TrimserveError):
    """The called method is not one of this version."""

    reason = "UNKNOWN_METHOD"


class UnknownService(TrimserveError):
    """The service whose health is asked is not one of this version."""

    reason = "UNKNOWN_SERVICE"


class Unauthenticated(TrimserveError):
    """The call carries no token, or one that belongs to nobody."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(TrimserveError):
    """The client is known, but may not use this service."""

    reason = "PERMISSION_DENIED"


class EngineBusy(TrimserveError):
    """The queue is full; nothing was computed for the request."""

    reason = "QUEUE_FULL"

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        """Say what is full.

        Args:
            message: what is full, its size and the knob that sets it.
            retry_after_seconds: a hint for the client, sent as `RetryInfo`.
        """
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class OutOfMemory(EngineBusy):
    """No memory could be had for this request while others hold theirs; it ends alone."""

    reason = "OUT_OF_MEMORY"


class TooManyCalls(EngineBusy):
    """As many calls are open as may be; nothing of this one was read."""

    reason = "TOO_MANY_CALLS"

    def __init__(self, subject: str, knob: str, limit: int, what: str = "calls") -> None:
        """Say whose limit is reached.

        Args:
            subject: `server`, or the client.
            knob: that sets the limit.
            limit: calls that may be open at once.
            what: which calls they are.
        """
        super().__init__(f"{subject} has {limit} {what} open ({knob})")
        self.subject = subject
        self.knob = knob
        self.limit = limit


class TooManyBytes(EngineBusy):
    """No room for a message came free in time; nothing of this one was read."""

    reason = "TOO_MANY_BYTES"


class TooFast(EngineBusy):
    """The client has used up an allowance of its own; nothing of this call was read."""

    reason = "TOO_FAST"

    def __init__(self, subject: str, knob: str, limit: int, retry_after_seconds: float) -> None:
        """Say whose allowance is used up.

        Args:
            subject: the client.
            knob: of its entry in the file of clients, that sets the allowance.
            limit: what it may have in a minute.
            retry_after_seconds: until it may have something again.
        """
        super().__init__(f"{subject} has had what it may have in a minute, {limit} ({knob})", retry_after_seconds)
        self.subject = subject
        self.knob = knob
        self.limit = limit


class EngineStopped(TrimserveError):
    """The engine takes no request now: it is starting, draining or has died."""

    reason = "ENGINE_STOPPED"


class RankFailed(EngineStopped):
    """One of the processes that share a model ended, hangs or is not in step; none of them can go on."""


class DeadlinePassed(TrimserveError):
    """The request's deadline passed while it was queued or running."""

    reason = "DEADLINE_PASSED"


class MessageLate(DeadlinePassed):
    """The client did not send its message within the time for it."""


class RequestFailed(TrimserveError):
    """The model failed on this one request; the cause is in the server's log."""

    reason = "REQUEST_FAILED"


class CheckpointError(TrimserveError):
    """A checkpoint that is not an Mllama, or asks for something that trimserve cannot honour."""

    reason = "CHECKPOINT_REFUSED"


class AdapterError(CheckpointError):
    """An adapter that is broken, is another model's, or asks for something that trimserve cannot honour.

    It names the file, the tensor or setting, and the reason.
    """

    reason = "ADAPTER_REFUSED"


class UnknownAdapter(TrimserveError):
    """No adapter of that name is loaded, or it is being unloaded."""

    reason = "ADAPTER_NOT_FOUND"


class AdapterExists(TrimserveError):
    """An adapter of that name is loaded already, or is not gone yet."""

    reason = "ADAPTER_EXISTS"


class CredentialsError(TrimserveError):
    """Certificates, keys or tokens that cannot be used; names the file and the option that sets it."""

    reason = "CREDENTIALS_REFUSED"


class CannotListen(TrimserveError):
    """An address that the server cannot listen on; names it and the options that set it."""

    reason = "CANNOT_LISTEN"
