"""`weft`: serve on this machine, list the model cards, keep users and keys, examine an installation."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import yaml
from dotenv import load_dotenv

from deployments import __version__
from deployments.protocol.card import load_cards
from deployments.protocol.errors import WeftError
from serve_app.cli import doctor, users
from serve_app.ray_serve import local_cluster
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.settings import ROOT, Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command line."""
    parser = argparse.ArgumentParser(prog="weft", description="Serves diffusion models on Ray.")
    parser.add_argument("--version", action="version", version=f"weft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="start everything on this machine and serve until Ctrl+C")
    serve.add_argument("--config", type=Path, default=ROOT / "serve_config.yaml", help="a Serve config file")
    serve.add_argument("--host", help="address to listen on (default: the config's, 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default: the config's, 8000)")
    commands.add_parser("models", help="list the model cards")
    users.add_commands(commands)
    look = commands.add_parser("doctor", help="examine a running installation; status 1 when it is unsafe")
    look.add_argument("--host", help="where the service listens (default: WEFT_HOST, 127.0.0.1)")
    look.add_argument("--port", type=int, help="(default: WEFT_PORT, 8000)")
    options = parser.parse_args(argv)
    load_dotenv(ROOT / ".env")
    try:
        if options.command == "models":
            return _list_models()
        if options.command in ("users", "keys"):
            return users.run(options, Settings.load(), _report)
        if options.command == "doctor":
            settings = Settings.load()
            host, port = options.host or settings.host or "127.0.0.1", options.port or settings.port or 8000
            return doctor.run(settings, host, port, _report)
        return _serve(options.config, options.host, options.port)
    except (WeftError, RuntimeError) as error:
        print(f"weft: {error}", file=sys.stderr)
        return 1


def _list_models() -> int:
    for card in load_cards(Settings.load().cards_dir).values():
        where = card.weights.path or card.weights.repo
        print(f"{card.id:24} {'/'.join(card.tasks):16} {card.licence.name:32} {where}")
    return 0


def _serve(config_file: Path, host: str | None, port: int | None) -> int:
    """Valkey, Ray, the graph; then wait for Ctrl+C and end all three."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    settings = Settings.load()
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    http = config.setdefault("http_options", {})
    http["host"] = host or settings.host or http.get("host", "127.0.0.1")
    http["port"] = port or settings.port or http.get("port", 8000)
    with ExitStack() as stack:
        _report(f"Weft {__version__}, data in {settings.data_dir}")
        os.environ["WEFT_DATA_DIR"] = str(settings.data_dir)  # the replicas read these
        if settings.redis_url is None:
            os.environ["REDIS_URL"] = stack.enter_context(
                EmbeddedRedis(settings.data_dir, settings.redis_prefix)
            )
            _report("job store: embedded Valkey")
        key = _demanded_key(settings, http["host"])
        if key is not None and settings.jwt_secret is None:
            os.environ["WEFT_JWT_SECRET"] = _kept_secret(settings.data_dir / "jwt_secret")
        os.environ.setdefault("FORWARDED_ALLOW_IPS", "")  # else uvicorn believes X-Forwarded-For of loopback
        _report("starting Ray")
        stack.enter_context(local_cluster.local_ray())
        _report("loading models")
        if not local_cluster.deploy(config, _report, stopped):
            return 0 if stopped.is_set() else 1
        _report(_greeting(http["host"], http["port"], key, config))
        stopped.wait()
        _report("stopping")
    return 0


def _demanded_key(settings: Settings, host: str) -> str | None:
    """The API key: the configured one, or one made and kept when others can reach us."""
    if settings.api_key is not None:
        return settings.api_key.get_secret_value()
    if _is_loopback(host):
        return None
    os.environ["WEFT_API_KEY"] = _kept_secret(settings.data_dir / "api_key")
    return os.environ["WEFT_API_KEY"]


def _kept_secret(path: Path) -> str:
    """32 random bytes as text, made at the first start; only our user may read the file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(32), encoding="ascii")
    return path.read_text(encoding="ascii").strip()


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _greeting(host: str, port: int, key: str | None, config: dict[str, Any]) -> str:
    """Where to look and a first request to copy."""
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


if __name__ == "__main__":
    sys.exit(main())
