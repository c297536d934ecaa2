"""Metrics of the process and of what its callers hold: workers, event loop, memory, credentials, log, refusals."""

from trimserve.server.declarations import Declarations

__all__ = ["ProcessMetrics"]

POOLS = ("text", "image")
"""Of the workers that prepare requests: those that tokenise, and those that decode images."""

LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

REFUSALS = (
    "unauthenticated",
    "permission_denied",
    "unknown_method",
    "too_many_calls",
    "too_many_bytes",
    "too_fast",
    "message_too_large",
    "invalid_request",
    "deadline_passed",
    "engine_stopped",
)
"""Why a call can end before its message was read."""


class ProcessMetrics(Declarations):
    """Declares them; `Metrics` adds those of calls and of the engine."""

    def _declare_process(self) -> None:
        pool = {"pool": POOLS}
        self.preparation_workers = self._gauge(
            "trimserve_preparation_workers", "Workers that tokenise, and that decode images.", pool
        )
        self.preparation_workers_busy = self._gauge(
            "trimserve_preparation_workers_busy", "Those that work on a request now.", pool
        )
        self.preparation_oldest_job_seconds = self._gauge(
            "trimserve_preparation_oldest_job_seconds",
            "For how long a worker has been at its present job, the longest of a pool; 0 if all are idle.",
            pool,
        )
        self.event_loop_lag_seconds = self._tallies(
            "trimserve_event_loop_lag_seconds", "How late the event loop ran what was due, four times a second.", LAG
        )
        self.event_loop_stalled_seconds = self._gauge(
            "trimserve_event_loop_stalled_seconds", "For how long the event loop has not run what is due; 0 if it does."
        )
        self.memory_left_bytes = self._gauge(
            "trimserve_memory_left_bytes",
            "Memory of the machine that could still be allocated within the limits of its control groups.",
        )
        kinds = {"kind": ("tokens", "certificates")}
        self.credential_reload_failures = self._counter(
            "trimserve_credential_reload_failures_total",
            "Attempts to read changed files of clients or certificates that failed; what was read before stays.",
            kinds,
        )
        self.credentials_loaded = self._gauge(
            "trimserve_credentials_loaded_timestamp_seconds",
            "When files of clients or certificates were last read with success.",
            {"kind": ()},
        )
        self.certificate_expiry = self._gauge(
            "trimserve_tls_certificate_expiry_timestamp_seconds",
            "When the certificate in use ends: the server's, and the first of the authorities of client certificates.",
            {"certificate": ()},
        )
        self.log_lines_dropped = self._counter(
            "trimserve_log_lines_dropped_total",
            "Lines of the log that were dropped, because nobody read standard error or it could not be written.",
        )

    def _declare_callers(self) -> None:
        self.refused_calls = self._counter(
            "trimserve_refused_calls_total",
            "Calls that were refused before a request was read from their message: without a token, beyond a limit, or "
            "with a message that is late, too large, malformed or missing. Health checks and unknown methods count.",
            {"reason": REFUSALS},
        )
        self.health_watches = self._gauge("trimserve_health_watches", "Health watches that are open now.")
        self.http_requests = self._counter(
            "trimserve_http_requests_total",
            "HTTP requests that were answered, by route and status; 499 means that the client left first.",
            {"route": (), "status": ()},
        )
        self.http_connections = self._gauge("trimserve_http_connections", "Connections of the HTTP port.")
        self.message_bytes_in_flight = self._gauge(
            "trimserve_message_bytes_in_flight",
            "Bytes of requests that are held now, and room set aside for those that are arriving.",
        )
