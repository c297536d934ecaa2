"""Options of the gRPC server: sizes, compression, pings, the age of connections."""

import grpc

from trimserve.config import ServerConfig

__all__ = ["OTHER_RPCS", "server_options"]

ACCEPTED_COMPRESSIONS = sum(1 << int(each) for each in (grpc.Compression.NoCompression, grpc.Compression.Gzip))
"""Of messages from clients. Answers are not compressed: a few tokens do not shrink."""

HANDSHAKE_SECONDS = 20.0
"""For the HTTP/2 handshake of a new connection; gRPC's default is two minutes."""

PING_TIMEOUT_SECONDS = 20.0
"""For the answer to a ping; without one, the connection counts as dead."""

LEAST_CLIENT_PING_SECONDS = 10.0
"""Clients that ping more often are disconnected."""

OTHER_RPCS = 1024
"""Calls that may be open beside the admitted ones: health checks, reflection, and calls being refused."""


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
        ("grpc.so_reuseport", 0),  # two servers on one port would share its traffic silently
        ("grpc.max_concurrent_streams", config.max_concurrent_rpcs + OTHER_RPCS),
        ("grpc.server_handshake_timeout_ms", _ms(HANDSHAKE_SECONDS)),
        ("grpc.keepalive_time_ms", _ms(config.keepalive_seconds)),
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
    return options


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
