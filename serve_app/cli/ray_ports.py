"""On which addresses the Ray processes of this machine really listen, and who can reach them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from serve_app.admission.loopback import is_loopback
from serve_app.cli.findings import Finding, Level, answer_of

# command lines of Ray's own programs, and titles of its workers
PROGRAM = re.compile(r"/ray/core/src/ray/\w+/(\w+)|/ray/(?:\w+/)+(\w+)\.py|^(ray::[^ ]+)")
WITHOUT_TOKEN = ("monitor", "dashboard", "ray::DashboardAgent")  # their metrics ports; others ask for one
SERVES_HTTP = "ray::ProxyActor"
WILDCARDS = ("0.0.0.0", "::")
JOBS = "/api/jobs/"  # of Ray's dashboard: a caller that may post to it runs code


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP port on which a process of Ray listens."""

    program: str  # such as raylet, or ray::ServeReplica:weft:Ingress
    address: str
    port: int
    has_token: bool  # whether the process was started with RAY_AUTH_MODE=token

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.address)

    def __str__(self) -> str:
        return f"{self.program} on {'*' if self.address in WILDCARDS else self.address}:{self.port}"


def ray_listeners(service: int | None = None) -> list[Listener]:
    """The ports of the Ray processes that `weft serve` (process `service`) has started.

    Without one those of all Ray processes on this machine that our user may see.
    """
    found = []
    for process in psutil.process_iter() if service is None else _started_by(service):
        with suppress(psutil.Error):
            match = PROGRAM.search(" ".join(process.cmdline()))
            if match is None:
                continue
            has_token = process.environ().get("RAY_AUTH_MODE", "").lower() == "token"
            program = next(name for name in match.groups() if name)
            found += [
                Listener(program, connection.laddr.ip, connection.laddr.port, has_token)
                for connection in process.net_connections(kind="tcp")
                if connection.status == psutil.CONN_LISTEN
            ]
    return found


def _started_by(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return []


def ray_findings(listeners: Sequence[Listener]) -> Iterator[Finding]:
    """Whether Ray can be reached from outside: a caller that can reach it runs code on every node."""
    if not listeners:
        yield Finding(Level.ok, "no Ray runs on this machine")
        return
    yield from _dashboard_findings(listeners)
    reached = [listener for listener in listeners if not listener.is_local]
    inner = [listener for listener in reached if listener.program != SERVES_HTTP]
    unlocked = [listener for listener in inner if not listener.has_token]
    metrics = [listener for listener in inner if listener.has_token and listener.program in WITHOUT_TOKEN]
    locked = [listener for listener in inner if listener.has_token and listener.program not in WITHOUT_TOKEN]
    if unlocked:
        yield Finding(
            Level.fail,
            f"other machines can reach {_list(unlocked)}, and no token is required there: they can run "
            "code here; set RAY_AUTH_MODE=token on every node, and close the ports by a firewall",
        )
    if metrics:
        yield Finding(
            Level.warn,
            f"other machines can reach {_list(metrics)}: metrics are among these ports, and they require no "
            "token; close them by a firewall",
        )
    if locked:
        yield Finding(
            Level.warn,
            f"other machines can reach {_list(locked)}, with Ray's token only; close the ports by a firewall "
            "(docs/security.md)",
        )
    local = len(listeners) - len(reached)
    if local:
        yield Finding(Level.ok, f"{local} ports of Ray can be reached from this machine only")


def _dashboard_findings(listeners: Sequence[Listener]) -> Iterator[Finding]:
    for listener in listeners:
        if listener.program != "dashboard":
            continue
        address = "127.0.0.1" if listener.address in WILDCARDS else listener.address
        with suppress(OSError):
            status, kind = answer_of(address, listener.port, JOBS)
            if status in (401, 403):
                yield Finding(Level.ok, "Ray's dashboard requires a token")
            elif status == 200 and "json" in kind:  # the metrics server answers every path, with text
                yield Finding(
                    Level.fail,
                    f"Ray's dashboard ({listener.port}) accepts jobs without a token; set RAY_AUTH_MODE="
                    "token on every node",
                )


def _list(listeners: Sequence[Listener]) -> str:
    return ", ".join(str(listener) for listener in listeners)
