"""What all transports of one server share."""

from dataclasses import dataclass, field

from trimserve.config import Config
from trimserve.server.backend import Backend
from trimserve.server.gate import Gate
from trimserve.server.metrics import Metrics
from trimserve.server.offload import Offload
from trimserve.server.tracing import Tracing

__all__ = ["Core"]


@dataclass(frozen=True, slots=True)
class Core:
    """An engine and everything around it that does not depend on the wire; put together by `serve.py`."""

    backend: Backend
    """Not started; the server starts and stops it."""
    config: Config
    metrics: Metrics
    gate: Gate
    tracing: Tracing | None
    """None if no traces are exported."""
    offload: Offload = field(default_factory=Offload)
    """For large messages."""
