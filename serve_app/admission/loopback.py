"""Whether an address reaches only this machine."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address


def is_loopback(host: str) -> bool:
    """True for `localhost`, 127.0.0.0/8 and ::1, however they are written; False for every other name.

    host: without a port, and without the brackets that IPv6 addresses have in URLs.
    """
    try:
        address = ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
