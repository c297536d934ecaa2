"""Options of the gRPC server: sizes, compression, what is buffered before anybody asks for it, pings, connections."""

import resource

import grpc

from trimserve.config import ServerConfig
from trimserve.server.transport import KEEPALIVE_SECONDS

__all__ = ["server_options"]

ACCEPTED_COMPRESSIONS = sum(1 << int(each) for each in (grpc.Compression.NoCompression, grpc.Compression.Gzip))
"""Of messages from clients. Answers are not compressed: a few tokens do not shrink."""

HANDSHAKE_SECONDS = 5.0
"""For the TLS and HTTP/2 handshakes of a new connection; gRPC's default is two minutes."""

PING_TIMEOUT_SECONDS = 20.0
"""For the answer to a ping; without one, the connection counts as dead."""

LEAST_CLIENT_PING_SECONDS = 10.0
"""Clients that ping more often are disconnected."""

OTHER_RPCS = 64
"""Calls that may be open on one connection beside the admitted ones: health checks, and calls being refused."""

MAX_METADATA_BYTES = 16 * 2**10
"""Of a call; gRPC refuses more by itself, and without an exact bound it would refuse at random from half of it on."""

UNREAD_BYTES = 16 * 2**10
"""Of a message that a client may send before it is asked for. gRPC's default grows to 16 MiB for each call."""

MAX_CONNECTIONS = 2048
"""At once; a connection takes memory and a descriptor before it says who it is."""

MAX_CONNECTIONS_RATIO = 0.5
"""The same, as a share of the descriptors that the process may have: the others are for files and metrics."""

IDLE_SECONDS = 300.0
"""A connection without calls is closed then; clients connect anew by themselves."""

MAX_PENDING_RPCS = 8192
"""Calls that have arrived and have not been looked at yet; gRPC cancels what is above, and by default at random from
1000 on."""

_INT_MAX = 2**31 - 1
"""gRPC counts no further, and takes it for no limit."""


def server_options(config: ServerConfig) -> list[tuple[str, int]]:
    """Arguments of `grpc.aio.server`.

    Args:
        config: limits of messages and connections.
    """
    options = [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.compression_enabled_algorithms_bitset", ACCEPTED_COMPRESSIONS),
        ("grpc.per_message_decompression", 0),  # codec.py inflates, up to a bound
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.http2.lookahead_bytes", UNREAD_BYTES),
        ("grpc.http2.bdp_probe", 0),  # it is what lets the bytes of unread messages grow
        ("grpc.max_allowed_incoming_connections", _max_connections()),
        ("grpc.max_connection_idle_ms", _ms(IDLE_SECONDS)),
        ("grpc.server.max_pending_requests", MAX_PENDING_RPCS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_RPCS),
        ("grpc.so_reuseport", 0),  # two servers on one port would share its traffic silently
        ("grpc.max_concurrent_streams", config.max_concurrent_rpcs + OTHER_RPCS),
        ("grpc.server_handshake_timeout_ms", _ms(HANDSHAKE_SECONDS)),
        ("grpc.keepalive_time_ms", _ms(KEEPALIVE_SECONDS)),
        ("grpc.keepalive_timeout_ms", _ms(PING_TIMEOUT_SECONDS)),
        ("grpc.http2.ping_timeout_ms", _ms(PING_TIMEOUT_SECONDS)),  # what gRPC really goes by
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(LEAST_CLIENT_PING_SECONDS)),
    ]
    if config.max_connection_age_seconds is not None:
        options += [
            ("grpc.max_connection_age_ms", _ms(config.max_connection_age_seconds)),
            ("grpc.max_connection_age_grace_ms", _ms(config.drain_grace_seconds)),
        ]
    return [(name, min(value, _INT_MAX)) for name, value in options]


def _max_connections() -> int:
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, int(MAX_CONNECTIONS_RATIO * descriptors))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
