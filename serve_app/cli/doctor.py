"""`weft doctor`: checks an installation while it runs, and reports what is unsafe or about to fail."""

from __future__ import annotations

import datetime
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, WeftError
from serve_app.admission.loopback import is_loopback
from serve_app.card_settings import known_cards
from serve_app.cli.findings import Finding, Level, about, as_text, listens, status_of
from serve_app.cli.findings import as_json as findings_as_json
from serve_app.cli.plan_findings import plan_findings
from serve_app.cli.ray_ports import ray_findings, ray_listeners
from serve_app.cli.serve_config import read_config, served_cards
from serve_app.cli.signing_findings import signing_findings
from serve_app.redis.append_only import inspect
from serve_app.redis.embedded import find_server, running_server
from serve_app.redis.info import RedisInfo, query_info
from serve_app.redis.reachable import check_redis
from serve_app.redis.server_files import owner_pid
from serve_app.settings import ROOT, Settings
from serve_app.signing import TEST_KEY

RAY_TOKEN = Path("~/.ray/auth_token")  # written by Ray, for everybody to read
KEY_MIN_CHARS = 24  # a shorter key was probably made up by a person and can be guessed
LOW_SPACE = 4  # times min_free_bytes
VALKEY_FILES = ("valkey/secret", "valkey/users.acl", "valkey/valkey.conf")
CLOCK_WARN_S, CLOCK_FAIL_S = 1.0, 5.0

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def doctor(
    host: Annotated[
        str | None, typer.Option(help="Address that the service listens on.  Default: WEFT_HOST, 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port that the service listens on.  Default: WEFT_PORT, 8000.")
    ] = None,
    config: Annotated[
        Path,
        typer.Option(
            help="Serve config file that the service runs with.  Default: serve_config.yaml.",
            show_default=False,
        ),
    ] = (ROOT / "serve_config.yaml"),
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Check a Ray cluster and each of its nodes, from one of them.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Address of the cluster.  Default: RAY_ADDRESS, that of this machine.")
    ] = None,
    node_types: Annotated[
        Path | None,
        typer.Option(help="File for ray up, or manifest of KubeRay, with the nodes that may be started."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a running installation; exit status 1 when it is unsafe."""
    settings = Settings.load()
    if cluster:
        from serve_app.cli.cluster_doctor import examine_cluster  # Ray takes a second

        findings = [*examine_cluster(address, node_types), *about("job store", _store(settings))]
    else:
        place = host or settings.host or "127.0.0.1", port or settings.port or 8000
        findings = [*examine(settings, *place), *about("models", model_findings(settings, config))]
    print(findings_as_json(findings) if as_json else as_text(findings))
    if any(finding.level is Level.fail for finding in findings):
        raise typer.Exit(1)


def examine(settings: Settings, host: str, port: int) -> Iterator[Finding]:
    """All findings, the most dangerous subjects first. host, port: where the service should be listening."""
    yield from about("keys", key_findings(settings, host))
    yield from about("service", service_findings(host, port, has_key=not settings.auth_disabled))
    yield from about("ports", ray_findings(ray_listeners(owner_pid(settings.data_dir))))
    yield from about("job store", _store(settings))
    yield from about("content credentials", signing_findings(settings, datetime.datetime.now(datetime.UTC)))
    yield from about("disk", disk_findings(settings))
    yield from about("secrets", secret_file_findings(settings.data_dir))
    try:
        yield from about("cards", card_findings(list(known_cards(settings).values())))
    except WeftError as error:
        yield Finding(Level.fail, f"the model cards cannot be read: {error.message}", "cards")


def model_findings(settings: Settings, config: Path) -> Iterator[Finding]:
    """How the models of this Serve config fit the devices that they run on."""
    try:
        yield from plan_findings(served_cards(read_config(config, None, None), config), settings.model_device)
    except WeftError as error:
        yield Finding(Level.fail, f"the served models are not known: {error.message}")


def key_findings(settings: Settings, host: str) -> Iterator[Finding]:
    """Whether every caller that can reach the service needs a key, and one that cannot be guessed."""
    generated = settings.data_dir / "api_key"
    if settings.api_key is not None:
        if len(settings.api_key.get_secret_value()) < KEY_MIN_CHARS:
            yield Finding(
                Level.warn, f"WEFT_API_KEY has under {KEY_MIN_CHARS} characters; use 32 random bytes as text"
            )
        else:
            yield Finding(Level.ok, "a key is required")
        if settings.jwt_secret is None and not (settings.data_dir / "jwt_secret").exists():
            yield Finding(
                Level.warn, "WEFT_JWT_SECRET is not set: no tokens, and the page keeps the key in its tab"
            )
    elif is_loopback(host):
        yield Finding(Level.ok, "no key is required, and only this machine can call")
    elif generated.exists():
        yield Finding(Level.ok, f"the key that `weft serve` generated is required ({generated})")
    else:
        yield Finding(Level.fail, f"no key is set, and other machines can reach {host}; set WEFT_API_KEY")


def service_findings(host: str, port: int, *, has_key: bool) -> Iterator[Finding]:
    """What the running service answers to a caller without a key."""
    address = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    try:
        health = status_of(address, port, "/health")
    except OSError:
        yield Finding(Level.warn, f"nothing listens on {address}:{port}; start it, or give --host and --port")
        return
    if health != 200:
        yield Finding(Level.warn, f"{address}:{port} answers /health with {health}; is it this service?")
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
            yield Finding(Level.fail, f"port {port} can be reached as {other}, not only on loopback")


def store_findings(info: RedisInfo, appendfsync: str | None) -> Iterator[Finding]:
    """Whether accepted jobs are kept, and what our account may do beyond its need.

    appendfsync: the server's setting where it is known from elsewhere.
    """
    yield Finding(Level.ok, f"the store answers (version {info.version or 'unknown'})")
    yield _durability(info.aof, info.appendfsync or appendfsync)
    if info.eviction not in (None, "noeviction"):
        yield Finding(
            Level.fail, f"the store may drop jobs (maxmemory-policy {info.eviction}); set noeviction"
        )
    yield _permissions(info)
    yield _clock(info.clock_ahead_s)


def _durability(aof: bool | None, appendfsync: str | None) -> Finding:
    if aof is False:
        return Finding(
            Level.fail, "the store writes nothing to disk: appendonly yes, or a restart loses every job"
        )
    if aof is None:
        return Finding(
            Level.warn, "the store does not say whether it writes to disk; check that appendonly is yes"
        )
    if appendfsync == "always":
        return Finding(Level.ok, "the store writes every change to disk before it answers")
    return Finding(
        Level.warn,
        f"the store writes to disk with appendfsync {appendfsync or 'unknown'}: everysec may lose the last "
        "second or two when the machine loses power",
    )


def _permissions(info: RedisInfo) -> Finding:
    permissions = {
        "run scripts": info.scripts,
        "read keys of others": info.foreign_keys,
        "reconfigure the server": info.admin,
    }
    unneeded = [name for name, allowed in permissions.items() if allowed]
    if unneeded:
        return Finding(
            Level.warn,
            f"our account of the store may {', '.join(unneeded)}; give it the ACL of docs/security.md",
        )
    return Finding(Level.ok, "our account of the store may use our keys and nothing else")


def _clock(ahead_s: float) -> Finding:
    apart_s = abs(ahead_s)
    if apart_s <= CLOCK_WARN_S:
        return Finding(Level.ok, "this machine's clock and the store's agree")
    level = Level.fail if apart_s > CLOCK_FAIL_S else Level.warn
    return Finding(
        level, f"this machine's clock and the store's are {apart_s:.1f} s apart; run a time service"
    )


def transport_findings(url: str) -> Iterator[Finding]:
    """Whether the connection to the store is protected."""
    parts = urlsplit(url)
    if parts.scheme == "unix" or is_loopback(parts.hostname or "localhost"):
        return
    if not parts.password:
        yield Finding(Level.fail, "the store requires no password; give it users (docs/security.md)")
    if parts.scheme != "rediss":
        yield Finding(Level.warn, "prompts travel to the store unencrypted; use rediss://")


def disk_findings(settings: Settings) -> Iterator[Finding]:
    """Free disk space for images and for the store's file."""
    folder = settings.data_dir
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    summary = f"{free / 2**30:.1f} GiB free at {folder}"
    if free < settings.min_free_bytes:
        yield Finding(Level.fail, f"{summary}: jobs are refused; free some space")
    elif free < LOW_SPACE * settings.min_free_bytes:
        yield Finding(
            Level.warn, f"{summary}: jobs are refused below {settings.min_free_bytes / 2**30:.2f} GiB"
        )
    else:
        yield Finding(Level.ok, summary)


def secret_file_findings(data_dir: Path) -> Iterator[Finding]:
    """Whether only our user can read the files with secrets."""
    ours = ("api_key", "jwt_secret", "ray_token", TEST_KEY, *VALKEY_FILES)
    for path in (*(data_dir / name for name in ours), RAY_TOKEN.expanduser()):
        if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
            yield Finding(Level.fail, f"other users of this machine can read {path}; run chmod 600 on it")


def card_findings(cards: list[ModelCard]) -> Iterator[Finding]:
    """Whether the local weights that the cards name exist."""
    local = [(card.id, path) for card in cards for path in _local_paths(card)]
    missing = [f"{name} ({path})" for name, path in local if not (ROOT / Path(path).expanduser()).exists()]
    if missing:
        yield Finding(Level.warn, f"weights are missing: {', '.join(missing)}")
    else:
        yield Finding(Level.ok, f"{len(cards)} model cards, none with weights missing on this machine")


def _local_paths(card: ModelCard) -> list[str]:
    """Of its weights, as the card writes them."""
    weights = card.weights
    paths = [file.path for file in weights.gguf.values() if not file.is_remote]
    return [path for path in (None if weights.is_remote else weights.path, *paths) if path is not None]


def _store(settings: Settings) -> Iterator[Finding]:
    url, appendfsync = None, None
    if settings.redis_url is not None:
        url = settings.redis_url.get_secret_value()
        try:
            check_redis(url, settings.redis_prefix)
        except BadRequest as error:
            yield Finding(Level.fail, error.message)
            return
        yield from transport_findings(url)
    else:
        url, appendfsync = running_server(settings.data_dir), "always"  # as redis/embedded.py starts it
    if url is None:
        yield Finding(
            Level.warn, f"no store: REDIS_URL is not set and no `weft serve` runs on {settings.data_dir}"
        )
        yield from _resting_store(settings)
        return
    try:
        info = query_info(url, settings.redis_prefix)
    except RuntimeError as error:
        yield Finding(Level.fail, f"the store does not answer ({error}); start it, or correct REDIS_URL")
        return
    yield from store_findings(info, appendfsync)


def _resting_store(settings: Settings) -> Iterator[Finding]:
    """Whether the files of an embedded store that does not run can be loaded."""
    directory = settings.data_dir / "valkey"
    if not directory.is_dir():
        return
    try:
        damage = inspect(directory, find_server())
    except RuntimeError as error:
        yield Finding(Level.fail, str(error))
        return
    if damage is not None:
        yield Finding(Level.fail, f"the job store is damaged: {damage.text}; run weft repair")


def own_addresses() -> list[str]:
    """The addresses of this machine that are not loopback."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    except OSError:
        return []
    return sorted(address for address in found if not is_loopback(address.partition("%")[0]))
