"""From exceptions to OpenAI's error objects; `STATUS` is the one table from errors to HTTP statuses.

Beside `server/grpc/statuses.py`: the reasons are the same, as `error.code`.
"""

import math
from collections.abc import Mapping
from http import HTTPStatus

from trimserve import errors
from trimserve.errors import TrimserveError

__all__ = ["CLIENT_LEFT", "STATUS", "error_body", "headers_of", "status_of"]

STATUS: Mapping[type[TrimserveError], HTTPStatus] = {
    errors.InvalidRequest: HTTPStatus.BAD_REQUEST,
    errors.MessageTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.UnknownMethod: HTTPStatus.NOT_FOUND,
    errors.UnknownService: HTTPStatus.NOT_FOUND,
    errors.Unauthenticated: HTTPStatus.UNAUTHORIZED,
    errors.PermissionDenied: HTTPStatus.FORBIDDEN,
    errors.EngineBusy: HTTPStatus.TOO_MANY_REQUESTS,  # retry later
    errors.OutOfMemory: HTTPStatus.TOO_MANY_REQUESTS,  # retry later
    errors.TooManyCalls: HTTPStatus.TOO_MANY_REQUESTS,  # retry later
    errors.TooManyBytes: HTTPStatus.TOO_MANY_REQUESTS,  # retry later
    errors.TooFast: HTTPStatus.TOO_MANY_REQUESTS,  # retry later
    errors.EngineStopped: HTTPStatus.SERVICE_UNAVAILABLE,  # another replica may serve it
    errors.RankFailed: HTTPStatus.SERVICE_UNAVAILABLE,  # the engine ends with it
    errors.DeadlinePassed: HTTPStatus.GATEWAY_TIMEOUT,
    errors.MessageLate: HTTPStatus.REQUEST_TIMEOUT,
    errors.RequestFailed: HTTPStatus.INTERNAL_SERVER_ERROR,  # this request only
    errors.CheckpointError: HTTPStatus.CONFLICT,  # at load time, before there are requests
    errors.AdapterError: HTTPStatus.CONFLICT,
    errors.UnknownAdapter: HTTPStatus.NOT_FOUND,
    errors.AdapterExists: HTTPStatus.CONFLICT,
    errors.CredentialsError: HTTPStatus.CONFLICT,  # at start
    errors.CannotListen: HTTPStatus.CONFLICT,  # the same
}
"""Any other exception is 500 and tells only the request id; its stack is logged."""

TYPES: Mapping[HTTPStatus, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
"""`error.type` of a status; others are `invalid_request_error` below 500 and `server_error` from there on."""

CLIENT_LEFT = 499
"""In metrics and logs, of a request whose client left before its end; nginx's number."""

MAX_MESSAGE_BYTES = 2048
"""Of an error's text."""


def status_of(error: Exception) -> HTTPStatus:
    """The HTTP status of an exception."""
    kinds = (STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    return next(kinds, HTTPStatus.INTERNAL_SERVER_ERROR)


def error_body(error: Exception, request_id: str) -> dict[str, object]:
    """The JSON that a client gets for an exception.

    Args:
        error: a TrimserveError, or any other, whose text is kept from the client.
        request_id: named where only the log tells more.
    """
    status = status_of(error)
    if isinstance(error, TrimserveError):
        reason, message = error.reason, str(error)
    else:
        reason, message = "INTERNAL", f"internal error; the server's log tells more of request {request_id}"
    return {
        "error": {
            "message": message.encode(errors="replace")[:MAX_MESSAGE_BYTES].decode(errors="ignore"),
            "type": TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
            "param": error.field if isinstance(error, errors.InvalidRequest) else None,
            "code": reason,
        }
    }


def headers_of(error: Exception) -> dict[str, str]:
    """Headers that belong to an exception's status."""
    match error:
        case errors.EngineBusy():
            milliseconds = math.ceil(error.retry_after_seconds * 1000)  # not before there is room
            return {"retry-after": str(math.ceil(error.retry_after_seconds)), "retry-after-ms": str(milliseconds)}
        case errors.Unauthenticated():
            return {"www-authenticate": "Bearer"}
        case _:
            return {}
