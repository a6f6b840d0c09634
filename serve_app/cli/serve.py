"""`weft serve`: the job store, Ray and the Serve applications on this machine, until Ctrl+C."""

from __future__ import annotations

import os
import secrets
import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from deployments import __version__
from serve_app.admission.loopback import is_loopback
from serve_app.cli.model_report import model_report
from serve_app.cli.serve_config import read_config
from serve_app.cli.start_checks import check_start
from serve_app.cli.stop_signals import StopSignals
from serve_app.cli.visible_gpus import only_gpu
from serve_app.cli.watchdog import ExitStatus, Watchdog
from serve_app.processes import adopt_orphans, end_descendants
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.settings import ROOT, Settings

SIGNALLED = 128  # plus the signal's number: the status of a process that a second signal has ended

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def serve(
    config: Annotated[
        Path, typer.Option(help="Serve config file.  Default: serve_config.yaml.", show_default=False)
    ] = (ROOT / "serve_config.yaml"),
    host: Annotated[
        str | None, typer.Option(help="Address to listen on.  Default: that of the config file, 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on.  Default: that of the config file, 8000.")
    ] = None,
) -> None:
    """Start the whole service on this machine and serve until Ctrl+C."""
    settings = Settings.load()
    serve_config = read_config(
        config,
        host if host is not None else settings.host,
        port if port is not None else settings.port,
    )
    check_start(settings, serve_config, config, _report)
    _run(settings, serve_config)


@dataclass(frozen=True, slots=True)
class AccessKey:
    """The API key that callers must send."""

    place: str  # where it is kept, as a shell command reads it
    text: str | None  # the key itself, when this start has generated it: it is shown once


def _run(settings: Settings, config: dict[str, Any]) -> None:
    """Start everything, and stop it at a signal. Raises typer.Exit with the status of the process."""
    adopt_orphans()
    store = None
    if settings.redis_url is None:
        store = EmbeddedRedis(settings.data_dir, settings.redis_prefix, _report)
    watchdog = Watchdog(store)
    with StopSignals(lambda number: watchdog.end_now(SIGNALLED + number)) as signals:
        try:
            status = _serve(settings, config, store, watchdog, signals)
        except SystemExit:
            if not signals.received.is_set():
                raise
            status = ExitStatus.stopped  # by Ray's own handler of SIGTERM, while Ray starts
        finally:
            watchdog.close()
            end_descendants()
    raise typer.Exit(status)


def _serve(
    settings: Settings,
    config: dict[str, Any],
    store: EmbeddedRedis | None,
    watchdog: Watchdog,
    signals: StopSignals,
) -> ExitStatus:
    """Serve until a signal comes, and stop what was started in the opposite order."""
    from serve_app.ray_serve.local_cluster import deploy, local_ray, parse_config  # Ray takes a second
    from serve_app.ray_serve.local_health import LocalHealth

    parse_config(config)
    http = config["http_options"]
    health = LocalHealth(http["host"], http["port"])
    with ExitStack() as stack:
        _report(f"Weft {__version__}, data in {settings.data_dir}")
        if store is not None:
            os.environ["REDIS_URL"] = stack.enter_context(store)
            _report("job store: embedded Valkey")
        key = _prepare_environment(settings, http["host"])
        if signals.received.is_set():
            return ExitStatus.stopped
        watchdog.start(lambda: health.fault() or (store.failure if store else None))
        _report("starting Ray")
        stack.enter_context(local_ray())
        stack.callback(watchdog.stopping)
        signals.install()  # Ray has set its own handlers
        _report("loading models")
        if not signals.received.is_set() and deploy(config, _report, signals.received):
            health.watch_service()
            prefix = (config["applications"][0].get("route_prefix") or "").rstrip("/")
            for sentence in model_report(http["host"], http["port"], prefix, Settings.load()):
                _report(f"  {sentence}")
            _report(greeting(http["host"], http["port"], key, config))
            signals.received.wait()
        elif not signals.received.is_set():
            return ExitStatus.failed
        _report("stopping")
    return ExitStatus.stopped


def _prepare_environment(settings: Settings, host: str) -> AccessKey | None:
    """Set the variables that replicas inherit. Returns the key that callers must send, None for none."""
    os.environ["WEFT_DATA_DIR"] = str(settings.data_dir)
    key = required_key(settings, host)
    if key is not None and settings.jwt_secret is None:
        os.environ["WEFT_JWT_SECRET"], _ = _kept_secret(settings.data_dir / "jwt_secret")
    if settings.model_device is not None and settings.model_device.startswith("cuda:"):
        # it is Ray that gives replicas theirs
        os.environ.update(only_gpu(int(settings.model_device.partition(":")[2])))
        os.environ["WEFT_MODEL_DEVICE"] = "cuda"
    _keep_token_of_ray(settings.data_dir)
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")  # uvicorn would trust X-Forwarded-For from loopback
    return key


def _keep_token_of_ray(data_dir: Path) -> None:
    """Give Ray a token of our own where it could write none: a read-only root, a user without a home."""
    from serve_app.ray_serve.private_api import finds_token  # Ray takes a second

    if not finds_token():
        file = data_dir / "ray_token"
        _kept_secret(file)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(file)


def required_key(settings: Settings, host: str) -> AccessKey | None:
    """The API key: the configured one, else a generated one if other machines can reach `host`, else None.

    A generated one is set in the environment, which replicas inherit.
    """
    if settings.api_key is not None:
        return AccessKey("$WEFT_API_KEY", None)
    if is_loopback(host):
        return None
    file = settings.data_dir / "api_key"
    key, is_new = _kept_secret(file)
    os.environ["WEFT_API_KEY"] = key
    return AccessKey(f"$(cat {shlex.quote(str(file))})", key if is_new else None)


def _kept_secret(path: Path) -> tuple[str, bool]:
    """32 random bytes as text, kept in a file that only our user can read; whether it is new."""
    is_new = not path.exists()
    if is_new:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        new.unlink(missing_ok=True)
        new.touch(mode=0o600)
        new.write_text(secrets.token_urlsafe(32), encoding="ascii")
        new.replace(path)  # a start that is killed leaves no half of a secret
    return path.read_text(encoding="ascii").strip(), is_new


def greeting(host: str, port: int, key: AccessKey | None, config: dict[str, Any]) -> str:
    """The addresses of the service, and a first request to copy. A key is in it once: when it is new."""
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    prefix = (config["applications"][0].get("route_prefix") or "/").rstrip("/")
    address = f"http://{f'[{name}]' if ':' in name else name}:{port}{prefix}"
    header = f' -H "Authorization: Bearer {key.place}"' if key else ""
    shown = f"Key, generated now and not shown again: {key.text}\n" if key and key.text else ""
    return (
        f"\nWeft is ready. The page: {address}/   API docs: {address}/docs\n"
        f"{shown}"
        "Try:\n"
        f"  curl -s {address}/v1/images/generations{header} -H 'Content-Type: application/json' \\\n"
        '    -d \'{"prompt": "a red circle on a white background", "response_format": "b64_json"}\' \\\n'
        "    | python3 -c 'import sys,json,base64; "
        'open("circle.png","wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\'\n'
        "Ctrl+C ends it."
    )


def _report(text: str) -> None:
    print(text, flush=True)
