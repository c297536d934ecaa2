"""From exceptions to statuses with details; `STATUS` is the one table from errors to gRPC codes."""

import math
from collections.abc import Mapping

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from trimserve import errors
from trimserve.errors import TrimserveError

__all__ = ["DOMAIN", "REQUEST_ID_KEY", "STATUS", "code_of", "status_of", "trailer"]

STATUS: Mapping[type[TrimserveError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,  # the caller can fix it
    errors.MessageTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,  # what gRPC itself says of a message that is too large
    errors.UnknownMethod: grpc.StatusCode.UNIMPLEMENTED,
    errors.UnknownService: grpc.StatusCode.NOT_FOUND,  # as the health protocol says
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.EngineBusy: grpc.StatusCode.RESOURCE_EXHAUSTED,  # retry later
    errors.OutOfMemory: grpc.StatusCode.RESOURCE_EXHAUSTED,  # retry later
    errors.TooManyCalls: grpc.StatusCode.RESOURCE_EXHAUSTED,  # retry later
    errors.TooManyBytes: grpc.StatusCode.RESOURCE_EXHAUSTED,  # retry later
    errors.TooFast: grpc.StatusCode.RESOURCE_EXHAUSTED,  # retry later
    errors.EngineStopped: grpc.StatusCode.UNAVAILABLE,  # another replica may serve it
    errors.RankFailed: grpc.StatusCode.UNAVAILABLE,  # the engine ends with it
    errors.DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.MessageLate: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.RequestFailed: grpc.StatusCode.INTERNAL,  # this request only
    errors.CheckpointError: grpc.StatusCode.FAILED_PRECONDITION,  # at load time, before there are RPCs
    errors.AdapterError: grpc.StatusCode.FAILED_PRECONDITION,  # the folder must be another, or mended
    errors.UnknownAdapter: grpc.StatusCode.NOT_FOUND,
    errors.AdapterExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.CredentialsError: grpc.StatusCode.FAILED_PRECONDITION,  # at start
    errors.CannotListen: grpc.StatusCode.FAILED_PRECONDITION,  # the same
}
"""Any other exception is INTERNAL and tells only the request id; its stack is logged."""

DOMAIN = "trimserve"
"""`ErrorInfo.domain` of every error."""

REQUEST_ID_KEY = "x-request-id"
"""Metadata that names a request, in both directions."""

MAX_MESSAGE_BYTES = 512
"""Of a status message. The trailers contain it three times, and clients accept 8 KiB of trailers."""


def code_of(error: Exception) -> grpc.StatusCode:
    """The gRPC code of an exception."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), grpc.StatusCode.INTERNAL)


def status_of(error: Exception, request_id: str) -> status_pb2.Status:
    """The status, with details, that a client gets for an exception.

    Args:
        error: a TrimserveError, or any other, whose text is kept from the client.
        request_id: put into `ErrorInfo.metadata`.
    """
    if isinstance(error, TrimserveError):
        reason, message = error.reason, str(error)
    else:
        reason, message = "INTERNAL", f"internal error; the server's log tells more of request {request_id}"
    status = status_pb2.Status(code=code_pb2.Code.Value(code_of(error).name), message=_cut(message))
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata={"request_id": request_id})
    for detail in (info, *_details(error)):
        status.details.add().Pack(detail)
    return status


def trailer(error: Exception, request_id: str) -> tuple[str, tuple[tuple[str, str | bytes], ...]]:
    """Message and trailing metadata of a status, as `abort` takes them.

    Args:
        error: as `status_of` takes it.
        request_id: put into `ErrorInfo.metadata` and `x-request-id`.
    """
    status = rpc_status.to_status(status_of(error, request_id))
    metadata: tuple[tuple[str, str | bytes], ...] = (*status.trailing_metadata, (REQUEST_ID_KEY, request_id))
    if isinstance(error, errors.EngineBusy):
        metadata += (("grpc-retry-pushback-ms", str(_retry_milliseconds(error))),)
    return status.details, metadata


def _cut(message: str) -> str:
    return message.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")


def _details(error: Exception) -> list[Message]:
    match error:
        case errors.InvalidRequest():
            violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=_cut(error.message))
            return [error_details_pb2.BadRequest(field_violations=[violation])]
        case errors.EngineBusy():
            delay = Duration()
            delay.FromMilliseconds(_retry_milliseconds(error))
            return [error_details_pb2.RetryInfo(retry_delay=delay), *_quota(error)]
        case _:
            return []


def _quota(error: errors.EngineBusy) -> list[Message]:
    if not isinstance(error, errors.TooManyCalls | errors.TooFast):
        return []
    limit = f"{error.knob} is {error.limit}"
    violation = error_details_pb2.QuotaFailure.Violation(subject=error.subject, description=limit)
    return [error_details_pb2.QuotaFailure(violations=[violation])]


def _retry_milliseconds(error: errors.EngineBusy) -> int:
    return math.ceil(error.retry_after_seconds * 1000)  # not before there is room
