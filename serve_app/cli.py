"""`weft`: serve on this machine, list the model cards."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import sys
import threading
import time
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
from serve_app.embedded_redis import EmbeddedRedis
from serve_app.settings import ROOT, Settings

STARTUP_LIMIT_S = 3600.0  # a large model may be downloading


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
    options = parser.parse_args(argv)
    load_dotenv(ROOT / ".env")
    try:
        if options.command == "models":
            return _list_models()
        return _serve(options.config, options.host, options.port)
    except (WeftError, RuntimeError) as error:
        print(f"weft: {error}", file=sys.stderr)
        return 1


def _list_models() -> int:
    for card in load_cards(ROOT / "configs" / "models").values():
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
    os.environ["WEFT_DATA_DIR"] = str(settings.data_dir)  # read by the replicas
    with ExitStack() as stack:
        _say(f"Weft {__version__}, data in {settings.data_dir}")
        if settings.redis_url is None:
            os.environ["REDIS_URL"] = stack.enter_context(EmbeddedRedis(settings.data_dir))
            _say("job store: embedded Valkey")
        key = _demanded_key(settings, http["host"])
        _start_ray(stack)
        _say("Ray is up; loading models")
        if not _deploy(config, stopped):
            return 0 if stopped.is_set() else 1
        _say(_greeting(http["host"], http["port"], key, config))
        stopped.wait()
        _say("stopping")
    return 0


def _demanded_key(settings: Settings, host: str) -> str | None:
    """The API key: the configured one, or one made and kept when others can reach us."""
    if settings.api_key is not None:
        return settings.api_key.get_secret_value()
    if _is_loopback(host):
        return None
    path = settings.data_dir / "api_key"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(32), encoding="ascii")
    os.environ["WEFT_API_KEY"] = path.read_text(encoding="ascii").strip()
    return os.environ["WEFT_API_KEY"]


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _start_ray(stack: ExitStack) -> None:
    """A Ray of our own on loopback, ended with the stack; other Rays on the machine are not touched."""
    import ray
    from ray import serve

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=256 * 2**20,
        _node_ip_address="127.0.0.1",
    )
    stack.callback(ray.shutdown)
    stack.callback(serve.shutdown)


def _deploy(config: dict[str, Any], stopped: threading.Event) -> bool:
    """Deploy as `serve deploy` does and tell every change until all runs; False if it does not."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(config)
    serve.start(
        proxy_location=schema.proxy_location,
        http_options=schema.http_options.model_dump(),
        logging_config=schema.logging_config,
    )
    client = _get_global_client()
    assert client is not None, "serve.start has made one"
    client.deploy_apps(schema)
    told: dict[str, str] = {}
    began = time.monotonic()
    while not stopped.wait(0.2):
        applications = serve.status().applications
        for application in applications.values():
            for name, deployment in application.deployments.items():
                state = "ready" if deployment.status == "HEALTHY" else deployment.message or "starting"
                if told.get(name) != state:
                    told[name] = state
                    _say(f"  {name}: {state}  ({time.monotonic() - began:.0f} s)")
        states = {application.status.value for application in applications.values()}
        if states == {"RUNNING"}:
            return True
        if "DEPLOY_FAILED" in states or time.monotonic() - began > STARTUP_LIMIT_S:
            for name, application in applications.items():
                last_words = "\n".join(application.message.strip().splitlines()[-8:])
                print(f"weft: {name} did not start: {last_words}", file=sys.stderr)
            return False
    return False


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


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
