"""`trimserve status`: how a running server is doing."""

import json
from dataclasses import replace
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict

from trimserve.commands.tables import as_bytes, print_facts
from trimserve.config import ServerConfig
from trimserve.connection import Connection, connected, with_connection
from trimserve.v1.model_pb2 import GetServerStatusResponse

__all__ = ["status"]

_DEFAULT = ServerConfig()
_HERE = f"{_DEFAULT.host}:{_DEFAULT.port}"


@with_connection(_HERE)
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False, *, connection: Connection
) -> None:
    """Tell the load and the memory of a running server."""
    with connected(connection if connection.address else replace(connection, address=_HERE)) as client:
        answer = client.status()
    if as_json:
        document = MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        print(json.dumps(document, indent=2))
    else:
        print_facts(_facts(answer))


def _facts(status: GetServerStatusResponse) -> dict[str, str]:
    used = status.self_kv_bytes + status.cross_kv_bytes
    saved = status.cross_kv_untrimmed_bytes - status.cross_kv_bytes
    trimmed = f", {saved / status.cross_kv_untrimmed_bytes:.0%} less than untrimmed" if saved > 0 else ""
    return {
        "trimserve": f"{status.version}, {'ready' if status.is_ready else 'not ready: it loads or drains'}",
        "up": f"{status.uptime_seconds:,.0f} s",
        "requests": f"{status.num_running} running (up to {status.max_batch} decode together), "
        f"{status.num_waiting} waiting of at most {status.max_queue}",
        "KV": f"{as_bytes(used)} of {as_bytes(status.kv_capacity_bytes)}",
        "  text": as_bytes(status.self_kv_bytes),
        "  images": f"{as_bytes(status.cross_kv_bytes)}{trimmed}",
        "image cache": f"{as_bytes(status.image_cache_bytes)} of {as_bytes(status.image_cache_capacity_bytes)}, "
        f"{status.image_cache_hits} hits, {status.image_cache_misses} misses",
    }
