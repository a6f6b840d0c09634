"""Which IP addresses belong to the public internet."""

from __future__ import annotations

import ipaddress

# `is_global` calls several of these global; see RFC 6890 and the metadata services of the clouds
_REFUSED_V4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
        "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
    )
)  # fmt: skip
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_V6 = tuple(
    ipaddress.IPv6Network(text)
    for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")  # Teredo is in the first
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # translated to the public IPv4 network


def is_public(address: str) -> bool:
    """Whether this is an address of the public internet that does not lead into a private network."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # also with a zone: fe80::1%eth0
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            refused = any(ip in network for network in _REFUSED_V6)
            return ip in _PUBLIC_V6 and ip.is_global and not refused
    return ip.is_global and not any(ip in network for network in _REFUSED_V4)
