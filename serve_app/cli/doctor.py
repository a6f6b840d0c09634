"""`weft doctor`: looks at an installation as it runs and says what is unsafe or about to fail."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from deployments.protocol.card import ModelCard, load_cards
from deployments.protocol.errors import WeftError
from serve_app.redis.embedded import running_server
from serve_app.redis.info import RedisInfo, query_info
from serve_app.settings import ROOT, Settings

DASHBOARD_PORT = 8265
RAY_PORTS = {6379: "Ray's control store", DASHBOARD_PORT: "Ray's dashboard", 10001: "Ray's client server"}
KEY_MIN_CHARS = 24  # a key that was made up by a person can be guessed
LOW_ROOM = 4  # times min_free_bytes
CLOCK_WARN_S, CLOCK_FAIL_S = 1.0, 5.0
CONNECT_S = 3.0


class Level(StrEnum):
    ok = "ok"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    text: str  # what was found; then, unless ok, what to do


def run(settings: Settings, host: str, port: int, report: Callable[[str], None]) -> int:
    """Exit status: 1 when anything failed. host, port: where the service should be listening."""
    findings = [*examine(settings, host, port)]
    for finding in findings:
        report(f"{finding.level.value:4}  {finding.text}")
    failed = sum(finding.level is Level.fail for finding in findings)
    warned = sum(finding.level is Level.warn for finding in findings)
    report(f"{len(findings)} checks: {failed} failed, {warned} with a warning")
    return 1 if failed else 0


def examine(settings: Settings, host: str, port: int) -> Iterator[Finding]:
    """Every finding, the most dangerous subjects first."""
    yield from key_findings(settings, host)
    yield from service_findings(host, port, has_key=not settings.auth_disabled)
    yield from ray_findings()
    yield from _store(settings)
    yield from disk_findings(settings)
    yield from secret_file_findings(settings.data_dir)
    try:
        yield from card_findings(list(load_cards(settings.cards_dir).values()))
    except WeftError as error:
        yield Finding(Level.fail, f"the model cards cannot be read: {error.message}")


def key_findings(settings: Settings, host: str) -> Iterator[Finding]:
    """Whether those who can reach us need a key, and one that cannot be guessed."""
    kept = settings.data_dir / "api_key"
    if settings.api_key is not None:
        if len(settings.api_key.get_secret_value()) < KEY_MIN_CHARS:
            yield Finding(
                Level.warn, f"WEFT_API_KEY has under {KEY_MIN_CHARS} characters; use 32 random bytes as text"
            )
        else:
            yield Finding(Level.ok, "a key is demanded")
        if settings.jwt_secret is None and not (settings.data_dir / "jwt_secret").exists():
            yield Finding(
                Level.warn, "WEFT_JWT_SECRET is not set: no tokens, and the page keeps the key in its tab"
            )
    elif is_loopback(host):
        yield Finding(Level.ok, "no key is demanded, and only this machine can call")
    elif kept.exists():
        yield Finding(Level.ok, f"the key that `weft serve` made is demanded ({kept})")
    else:
        yield Finding(Level.fail, f"no key is set, and {host} can be reached by others; set WEFT_API_KEY")


def service_findings(host: str, port: int, *, has_key: bool) -> Iterator[Finding]:
    """What the running service answers to somebody without a key."""
    address = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    try:
        health = status_of(address, port, "/health")
    except OSError:
        yield Finding(Level.warn, f"nothing listens on {address}:{port}; start it, or give --host and --port")
        return
    if health != 200:
        yield Finding(Level.warn, f"{address}:{port} answers /health with {health}; is that this service?")
        return
    models = status_of(address, port, "/api/models/")
    if models == 401:
        yield Finding(Level.ok, "the service answers 401 to callers without a key")
    elif has_key or not is_loopback(host):
        yield Finding(Level.fail, f"callers without a key get {models}; restart it with WEFT_API_KEY set")
    else:
        yield Finding(Level.ok, "the service answers its own machine without a key")
    for other in own_addresses():
        if is_loopback(host) and listens(other, port):
            yield Finding(Level.fail, f"port {port} can be reached as {other}, not on loopback alone")


def ray_findings() -> Iterator[Finding]:
    """Whether strangers can reach Ray: whoever can, runs code on every node."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    local = listens("127.0.0.1", DASHBOARD_PORT)
    if local and status_of("127.0.0.1", DASHBOARD_PORT, "/api/jobs/") not in (401, 403):
        yield Finding(
            Level.fail, "Ray's dashboard takes jobs without a token; set RAY_AUTH_MODE=token on every node"
        )
    elif local:
        yield Finding(Level.ok, "Ray's dashboard demands a token")
    elif mode == "disabled":
        yield Finding(Level.fail, "RAY_AUTH_MODE=disabled; set it to token")
    else:
        yield Finding(Level.ok, "no Ray dashboard on this machine")
    reached = [
        f"{name} ({address}:{port})"
        for address in own_addresses()
        for port, name in RAY_PORTS.items()
        if listens(address, port)
    ]
    if reached:
        yield Finding(
            Level.warn,
            f"can be reached from outside this machine unless a firewall stops it: {', '.join(reached)}; "
            "see docs/security.md for the ports",
        )


def store_findings(info: RedisInfo, appendfsync: str | None) -> Iterator[Finding]:
    """Whether what is accepted is kept, and how much a stolen connection could do."""
    yield Finding(Level.ok, f"the store answers (version {info.version or 'unknown'})")
    fsync = info.appendfsync or appendfsync
    if info.aof is False:
        yield Finding(
            Level.fail, "the store writes nothing to disk: appendonly yes, or a restart loses every job"
        )
    elif info.aof is None:
        yield Finding(
            Level.warn, "the store does not tell whether it writes to disk; see that appendonly is yes"
        )
    elif fsync == "always":
        yield Finding(Level.ok, "the store writes every change to disk before it answers")
    else:
        yield Finding(
            Level.warn,
            f"the store writes to disk with appendfsync {fsync or 'unknown'}: everysec may lose the last "
            "second or two when the machine loses power",
        )
    if info.eviction not in (None, "noeviction"):
        yield Finding(
            Level.fail, f"the store may drop jobs (maxmemory-policy {info.eviction}); set noeviction"
        )
    wide = [
        name
        for name, may in (
            ("run scripts", info.scripts),
            ("read keys of others", info.foreign_keys),
            ("reconfigure the server", info.admin),
        )
        if may
    ]
    if wide:
        yield Finding(
            Level.warn, f"our account of the store may {', '.join(wide)}; give it the ACL of docs/security.md"
        )
    else:
        yield Finding(Level.ok, "our account of the store may touch our keys and nothing else")
    apart = abs(info.clock_ahead_s)
    if apart > CLOCK_WARN_S:
        level = Level.fail if apart > CLOCK_FAIL_S else Level.warn
        yield Finding(
            level, f"this machine's clock and the store's are {apart:.1f} s apart; run a time service"
        )
    else:
        yield Finding(Level.ok, "this machine's clock and the store's agree")


def transport_findings(url: str) -> Iterator[Finding]:
    """Whether the way to the store can be listened to."""
    parts = urlsplit(url)
    if parts.scheme == "unix" or is_loopback(parts.hostname or "localhost"):
        return
    if not parts.password:
        yield Finding(Level.fail, "the store asks for no password; give it users (docs/security.md)")
    if parts.scheme != "rediss":
        yield Finding(Level.warn, "prompts travel to the store in the clear; use rediss://")


def disk_findings(settings: Settings) -> Iterator[Finding]:
    """Room for pictures and for the store's file."""
    folder = settings.data_dir
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    summary = f"{free / 2**30:.1f} GiB free at {folder}"
    if free < settings.min_free_bytes:
        yield Finding(Level.fail, f"{summary}: jobs are refused; make room")
    elif free < LOW_ROOM * settings.min_free_bytes:
        yield Finding(
            Level.warn, f"{summary}: jobs are refused below {settings.min_free_bytes / 2**30:.2f} GiB"
        )
    else:
        yield Finding(Level.ok, summary)


def secret_file_findings(data_dir: Path) -> Iterator[Finding]:
    """Whether only our user may read what is secret."""
    for name in ("api_key", "jwt_secret", "valkey/secret", "valkey/users.acl", "valkey/valkey.conf"):
        path = data_dir / name
        if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
            yield Finding(Level.fail, f"others on this machine can read {path}; chmod 600 it")


def card_findings(cards: list[ModelCard]) -> Iterator[Finding]:
    """Whether the weights that cards say are here, are here."""
    missing = [
        f"{card.id} ({card.weights.path})"
        for card in cards
        if card.weights.path is not None and not (ROOT / card.weights.path).exists()
    ]
    if missing:
        yield Finding(Level.warn, f"weights are not where the cards say: {', '.join(missing)}")
    else:
        yield Finding(Level.ok, f"{len(cards)} model cards, none with weights missing on this machine")


def _store(settings: Settings) -> Iterator[Finding]:
    url, appendfsync = None, None
    if settings.redis_url is not None:
        url = settings.redis_url.get_secret_value()
        yield from transport_findings(url)
    else:
        url, appendfsync = running_server(settings.data_dir), "always"  # as embedded_redis.py starts it
    if url is None:
        yield Finding(
            Level.warn, f"no store: REDIS_URL is not set and no `weft serve` runs on {settings.data_dir}"
        )
        return
    try:
        info = query_info(url, settings.redis_prefix)
    except RuntimeError as error:
        yield Finding(Level.fail, f"the store cannot be asked ({error}); start it, or mend REDIS_URL")
        return
    yield from store_findings(info, appendfsync)


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listens(address: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        with socket.create_connection((address, port), timeout=CONNECT_S):
            return True
    except OSError:
        return False


def status_of(address: str, port: int, path: str) -> int:
    """The HTTP status of a GET without any key. Raises OSError when nobody answers."""
    connection = http.client.HTTPConnection(address, port, timeout=CONNECT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except http.client.HTTPException as error:
        raise ConnectionError(f"{address}:{port} speaks no HTTP") from error
    finally:
        connection.close()


def own_addresses() -> list[str]:
    """This machine's addresses that others may reach it by."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    except OSError:
        return []
    return sorted(address for address in found if not is_loopback(address.partition("%")[0]))
