"""What a failed call tells: the status and its details, as plain values."""

from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

__all__ = ["Refusal"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A status other than OK."""

    code: str
    """Name of the gRPC status, such as `INVALID_ARGUMENT`."""
    message: str
    reason: str = ""
    """`ErrorInfo.reason`; empty if it is not the server who refuses, but gRPC."""
    field: str = ""
    """Path of the field of the request that is wrong, such as `trim.k_ratio`; empty if none is."""
    description: str = ""
    """What is wrong with `field`."""
    retry_seconds: float | None = None
    """After which the server asks to be tried again; None if it does not."""

    def __str__(self) -> str:
        """For a person, in one line."""
        return f"{self.code}: {' '.join(self.message.split())}"

    @classmethod
    def of(cls, error: grpc.RpcError) -> "Refusal":
        """Read an error.

        Args:
            error: that a call raised.
        """
        reason = field = description = ""
        retry_seconds = None
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # what a call raises is the call
        for detail in () if status is None else status.details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                reason = error_details_pb2.ErrorInfo.FromString(detail.value).reason
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                violation = error_details_pb2.BadRequest.FromString(detail.value).field_violations[0]
                field, description = violation.field, violation.description
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
                retry_seconds = delay.seconds + delay.nanos * 1e-9
        return cls(error.code().name, error.details() or "", reason, field, description, retry_seconds)
