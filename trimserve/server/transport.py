"""What gRPC's transport is told: sizes, compression, pings, the age of connections."""

import grpc

from trimserve.config import ServerConfig

__all__ = ["channel_options"]

ACCEPTED_COMPRESSIONS = sum(1 << int(each) for each in (grpc.Compression.NoCompression, grpc.Compression.Gzip))
"""What messages from clients may have. Answers have none: a few tokens do not shrink."""


def channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    """The arguments of a server.

    Args:
        config: limits of messages and connections.
    """
    options = [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.compression_enabled_algorithms_bitset", ACCEPTED_COMPRESSIONS),
        ("grpc.per_message_decompression", 0),  # codec.py inflates, up to a bound
        ("grpc.so_reuseport", 0),  # two servers on one port would share its traffic silently
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
    if config.max_connection_age_seconds is not None:
        options += [
            ("grpc.max_connection_age_ms", round(config.max_connection_age_seconds * 1000)),
            ("grpc.max_connection_age_grace_ms", round(config.drain_grace_seconds * 1000)),
        ]
    return options
