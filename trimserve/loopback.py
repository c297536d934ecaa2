"""Which addresses are this machine's own, and what keeps a channel to them off a proxy.

gRPC and urllib take proxies from the environment (`http_proxy` and the like), and a proxy on another machine cannot
reach our loopback. Without `no_proxy`, which many forget, it would be asked to all the same.
"""

import ipaddress
import re

__all__ = ["is_loopback", "proxy_options"]

# gRPC's names of a server: HOST, HOST:PORT, [IPV6]:PORT, dns:HOST:PORT, dns://AUTHORITY/HOST:PORT, ipv4:..., ipv6:...
_TARGET = re.compile(r"(?:(?:dns|ipv4|ipv6):(?://[^/]*/)?)?(?:\[(?P<ipv6>[^\]]*)\]|(?P<host>[^:,/]*))(?::\d+|,|$)")


def is_loopback(host: str) -> bool:
    """Whether only this machine can mean this host.

    Args:
        host: an address, or a name, of which only `localhost` is known.
    """
    if host == "localhost":
        return True
    address = _address(host)
    return address is not None and address.is_loopback


def proxy_options(address: str) -> list[tuple[str, int]]:
    """Channel options for a server: none, which lets the environment name a proxy, but for this machine never one.

    Args:
        address: as gRPC takes it; `0.0.0.0` and `::`, which a server may tell that it listens on, are this machine too.
    """
    target = _TARGET.match(address)
    host = address if target is None else target["ipv6"] or target["host"]
    name = host.lower().removesuffix(".")
    number = _address(name)
    is_own = is_loopback(name) or name.endswith(".localhost") or (number is not None and number.is_unspecified)
    return [("grpc.enable_http_proxy", 0)] if is_own else []


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
