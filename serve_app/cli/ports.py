"""Whether an address is free to listen on, found by a plain bind.

Serve's proxy sets SO_REUSEPORT: it would share a port that another service has, and the system would deal the
connections between the two.
"""

from __future__ import annotations

import errno
import socket

import psutil

from deployments.protocol.errors import BadRequest


def check_address(host: str, port: object, what: str, setting: str) -> None:
    """Returns when a server can listen at host and port.

    what: of the server, such as HTTP.  setting: where the port can be changed.
    Raises BadRequest with one sentence on what is wrong and what would be right.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
        raise BadRequest(f"the port for {what} is {port!r}; give a whole number from 1 to 65535 as {setting}")
    for family, address in _addresses(host, port):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # only a listener is in the way, not what is left of old connections
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
                probe.listen(1)
        except OSError as error:
            raise BadRequest(_sentence(error, host, port, what, setting)) from None


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise BadRequest(
            f"the address {host!r} is not known on this machine; give 127.0.0.1, 0.0.0.0 or an address of "
            "its own as --host or WEFT_HOST"
        ) from None
    return [(socket.AddressFamily(info[0]), info[4]) for info in found]  # type: ignore[misc]


def _sentence(error: OSError, host: str, port: int, what: str, setting: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is in use{_holder(port)}, so {what} cannot use it; end that program, or "
            f"give another port as {setting}"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"port {port} may be used by root only; give one above 1023 as {setting}, with a proxy in front "
            "for 80 or 443"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"{host} is not an address of this machine; give 127.0.0.1, 0.0.0.0 or one of its own as --host "
            "or WEFT_HOST"
        )
    return f"{what} cannot listen on {host}:{port} ({error.strerror}); give another port as {setting}"


def _holder(port: int) -> str:
    """` by NAME (process PID)` of the program that listens on this port; empty when that is not known."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    except (psutil.Error, OSError):
        pass
    return ""
