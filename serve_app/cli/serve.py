"""`weft serve`: the job store, Ray and the Serve applications on this machine, until Ctrl+C."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from deployments import __version__
from serve_app.admission.loopback import is_loopback
from serve_app.ray_serve.local_cluster import deploy, local_ray
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.settings import ROOT, Settings

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
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    settings = Settings.load()
    serve_config = _with_address(config, host or settings.host, port or settings.port)
    http = serve_config["http_options"]
    with ExitStack() as stack:
        _report(f"Weft {__version__}, data in {settings.data_dir}")
        key = _prepare_environment(settings, http["host"], stack)
        _report("starting Ray")
        stack.enter_context(local_ray())
        _report("loading models")
        if deploy(serve_config, _report, stopped):
            _report(_greeting(http["host"], http["port"], key, serve_config))
            stopped.wait()
            _report("stopping")
        elif not stopped.is_set():
            raise typer.Exit(1)


def _with_address(file: Path, host: str | None, port: int | None) -> dict[str, Any]:
    """The Serve config of this file, listening on `host` and `port` where they are given."""
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    http = config.setdefault("http_options", {})
    http["host"] = host or http.get("host", "127.0.0.1")
    http["port"] = port or http.get("port", 8000)
    return config


def _prepare_environment(settings: Settings, host: str, stack: ExitStack) -> str | None:
    """Set the variables that replicas inherit, and start the embedded store when no other is configured.

    Returns the API key that callers must send, None when none is required.
    """
    os.environ["WEFT_DATA_DIR"] = str(settings.data_dir)
    if settings.redis_url is None:
        store = EmbeddedRedis(settings.data_dir, settings.redis_prefix)
        os.environ["REDIS_URL"] = stack.enter_context(store)
        _report("job store: embedded Valkey")
    key = required_key(settings, host)
    if key is not None and settings.jwt_secret is None:
        os.environ["WEFT_JWT_SECRET"] = _kept_secret(settings.data_dir / "jwt_secret")
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")  # uvicorn would trust X-Forwarded-For from loopback
    return key


def required_key(settings: Settings, host: str) -> str | None:
    """The API key: the configured one, else a generated one if other machines can reach `host`, else None."""
    if settings.api_key is not None:
        return settings.api_key.get_secret_value()
    if is_loopback(host):
        return None
    os.environ["WEFT_API_KEY"] = _kept_secret(settings.data_dir / "api_key")
    return os.environ["WEFT_API_KEY"]


def _kept_secret(path: Path) -> str:
    """32 random bytes as text, created at the first start in a file that only our user can read."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(32), encoding="ascii")
    return path.read_text(encoding="ascii").strip()


def _greeting(host: str, port: int, key: str | None, config: dict[str, Any]) -> str:
    """The addresses of the service, and a first request to copy."""
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    prefix = (config["applications"][0].get("route_prefix") or "/").rstrip("/")
    address = f"http://{f'[{name}]' if ':' in name else name}:{port}{prefix}"
    header = f' -H "Authorization: Bearer {key}"' if key else ""
    return (
        f"\nWeft is ready. The page: {address}/   API docs: {address}/docs\n"
        f"{f'Key: {key}' + chr(10) if key else ''}"
        "Try:\n"
        f"  curl -s {address}/v1/images/generations{header} -H 'Content-Type: application/json' \\\n"
        '    -d \'{"prompt": "a red circle on a white background", "response_format": "b64_json"}\' \\\n'
        "    | python3 -c 'import sys,json,base64; "
        'open("circle.png","wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\'\n'
        "Ctrl+C ends it."
    )


def _report(text: str) -> None:
    print(text, flush=True)
