"""Who called, and under which address, as the operator's own proxies report it (pure).

Behind a proxy all callers have the proxy's address. It names them in X-Forwarded-For or Forwarded (RFC 7239),
which everybody else can write too: the headers count only from addresses that the operator trusts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import NamedTuple

MAX_HOPS = 32  # the last ones; the others are not read
SCHEMES = ("http", "https", "ws", "wss")
HOST = re.compile(r"([A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:\d{1,5})?")
IPV6_PREFIX_BITS = 64  # what one customer of a provider has; a limit of a single address would not hold them
_ELEMENT = re.compile(r'(?:"[^"]*"|[^,"])+')
_PAIR = re.compile(r'([A-Za-z]+)=("[^"]*"|[^;,"\s]*)')

Address = IPv4Address | IPv6Address
Values = Callable[[str], list[str]]  # every value of the header with this name, in lower case


class Origin(NamedTuple):
    """Where a call came from, and how the caller reached the service."""

    address: str  # of the caller; its IP address if it has one
    scheme: str | None = None  # None: that of the connection
    host: str | None = None  # None: the Host header


class _Hop(NamedTuple):
    """What one proxy reports of its own caller."""

    address: Address | None  # None: it does not say, or not readably
    scheme: str | None
    host: str | None


class TrustedProxies:
    """The proxies of the operator, by address."""

    def __init__(self, networks: Iterable[str]) -> None:
        """networks: addresses and networks (10.0.0.0/8, 2001:db8::/32). None: no header is believed."""
        self._networks = tuple(ip_network(network) for network in networks)

    def origin(self, peer: str, values: Values) -> Origin:
        """The origin of a call from this peer: the last address in the headers that is no proxy of ours."""
        origin = Origin(peer)
        if not self._trusts(_parsed(peer)):
            return origin
        for hop in reversed(_hops(values)):
            if hop.address is None:
                return origin._replace(scheme=hop.scheme, host=hop.host) if origin.address == peer else origin
            origin = Origin(str(hop.address), hop.scheme, hop.host)
            if not self._trusts(hop.address):
                break
        return origin

    def _trusts(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)


def limit_name(address: str) -> str:
    """The name under which calls from this address are counted: itself, or its network for IPv6."""
    ip = _parsed(address)
    return str(ip_network((ip, IPV6_PREFIX_BITS), strict=False)) if isinstance(ip, IPv6Address) else address


def _hops(values: Values) -> list[_Hop]:
    """What the proxies report, the nearest last. Empty where both kinds of header contradict each other: a
    proxy passes on the kind that it does not write itself.
    """
    listed, standard = _listed_hops(values), _standard_hops(values)
    if listed and standard and [hop.address for hop in listed] != [hop.address for hop in standard]:
        return []
    return standard or listed


def _listed_hops(values: Values) -> list[_Hop]:
    """From the headers X-Forwarded-*. The protocol and host of the nearest proxy stand for all, unless there
    are as many of them as addresses.
    """
    addresses = _list(values, "x-forwarded-for")
    schemes = _list(values, "x-forwarded-proto")
    hosts = _list(values, "x-forwarded-host")
    if not addresses and (schemes or hosts):
        addresses = [""]
    return [
        _Hop(_parsed(text), _scheme(_of_hop(schemes, at, addresses)), _host(_of_hop(hosts, at, addresses)))
        for at, text in enumerate(addresses)
    ]


def _of_hop(found: list[str], at: int, addresses: list[str]) -> str:
    if len(found) == len(addresses):
        return found[at]
    return found[-1] if found else ""


def _standard_hops(values: Values) -> list[_Hop]:
    """From the header Forwarded; none where a quote of a caller could take in what the proxy has appended."""
    text = ", ".join(values("forwarded"))
    if "\\" in text or text.count('"') % 2:
        return []
    return [_standard_hop(part) for part in _ELEMENT.findall(text) if part.strip()][-MAX_HOPS:]


def _standard_hop(element: str) -> _Hop:
    given = {name.lower(): value.strip('"') for name, value in _PAIR.findall(element)}
    return _Hop(_parsed(given.get("for", "")), _scheme(given.get("proto", "")), _host(given.get("host", "")))


def _list(values: Values, name: str) -> list[str]:
    """The values of a header that may be there several times, each a list."""
    found = [part.strip() for line in values(name) for part in line.split(",")]
    return found[-MAX_HOPS:]


def _parsed(text: str) -> Address | None:
    """The IP address, which may have a port, and brackets if it is IPv6; None for anything else."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _scheme(text: str) -> str | None:
    return text.lower() if text.lower() in SCHEMES else None


def _host(text: str) -> str | None:
    return text if HOST.fullmatch(text) else None
