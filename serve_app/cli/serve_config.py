"""A Serve config file as `weft serve` starts it, checked without Ray."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, NotFound
from deployments.protocol.invalid_values import shown, suggestion, wrong_values
from deployments.protocol.yaml_file import read_mapping
from serve_app.card_settings import known_cards
from serve_app.ray_serve.args import (
    AppArgs,
    BuilderArgs,
    GatewayArgs,
    ModelArgs,
    WeightsArgs,
    select_cards,
)
from serve_app.settings import Settings

# Serve ignores a key that it does not know; tests/test_serve_configs.py compares these with its schema
CONFIG_KEYS = (
    *("proxy_location", "http_options", "grpc_options", "controller_options", "logging_config"),
    *("tracing_config", "applications", "target_capacity"),
)
APPLICATION_KEYS = (
    *("name", "route_prefix", "import_path", "runtime_env", "host", "port", "deployments"),
    *("autoscaling_policy", "args", "logging_config", "external_scaler_enabled"),
)
HTTP_KEYS = (
    *("host", "port", "root_path", "request_timeout_s", "keep_alive_timeout_s"),
    *("ssl_keyfile", "ssl_certfile", "ssl_keyfile_password", "ssl_ca_certs"),
)
BUILDERS: dict[str, type[BuilderArgs]] = {
    "build": AppArgs,
    "build_gateway": GatewayArgs,
    "build_model": ModelArgs,
    "build_weights": WeightsArgs,
}


def read_config(file: Path, host: str | None, port: int | None) -> dict[str, Any]:
    """The Serve config of this file, listening on `host` and `port` where they are given.

    Raises BadRequest with one sentence that names the file and the key at fault.
    """
    config = read_mapping(file)
    if not config:
        raise BadRequest(f"{file} is empty; see serve_config.yaml for what belongs into it")
    _refuse_unknown(config, CONFIG_KEYS, str(file))
    http = config.setdefault("http_options", {})
    if not isinstance(http, dict):
        raise BadRequest(f"http_options of {file} should hold host and port")
    _refuse_unknown(http, HTTP_KEYS, f"http_options of {file}")
    http["host"] = host if host is not None else http.get("host", "127.0.0.1")
    http["port"] = port if port is not None else http.get("port", 8000)
    if not isinstance(http["host"], str):
        raise BadRequest(f"http_options.host of {file} is {http['host']!r}; write an address in quotes")
    _check_applications(config.get("applications"), file)
    return config


def served_cards(config: Mapping[str, Any], file: Path) -> dict[str, ModelCard]:
    """The cards that the applications of `config` serve, with their refiners; by id.

    Raises BadRequest for arguments that are not valid, NotFound for a model without a card.
    """
    cards: dict[str, ModelCard] = {}
    for application in config["applications"]:
        module, _, builder = str(application["import_path"]).replace(":", ".").rpartition(".")
        if module != "serve_app.app" or builder not in BUILDERS:
            continue  # an application of the operator's own
        where = f"args of the application {application.get('name', 'default')!r} in {file}"
        args = _builder_args(BUILDERS[builder], application.get("args") or {}, where)
        settings = Settings.load(**args.settings)
        if isinstance(args, AppArgs | ModelArgs | WeightsArgs):
            known, is_all = known_cards(settings), isinstance(args, AppArgs)
            selected = select_cards(args.models, known, settings, one_application=is_all)
            cards |= selected | dict(_refiners(selected, known))
    return cards


def _builder_args(kind: type[BuilderArgs], values: object, where: str) -> BuilderArgs:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise BadRequest(f"{where}: {wrong_values(error, kind.model_fields)}") from None


def _refiners(
    selected: Mapping[str, ModelCard], known: Mapping[str, ModelCard]
) -> Iterator[tuple[str, ModelCard]]:
    for card in selected.values():
        if card.refiner is None:
            continue
        if card.refiner not in known:
            hint = suggestion(card.refiner, known)
            raise NotFound(f"{card.id} names the refiner {card.refiner!r}, which has no card{hint}")
        yield card.refiner, known[card.refiner]


def _refuse_unknown(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in known:
            hint = suggestion(key, known) or f"; there is {', '.join(known)}"
            raise BadRequest(f"the key {key!r} of {where} is unknown{hint}")


def _check_applications(applications: object, file: Path) -> None:
    if not isinstance(applications, list) or not applications:
        raise BadRequest(f"{file} has no applications, so nothing would be served; see serve_config.yaml")
    for application in applications:
        if not isinstance(application, dict) or not isinstance(application.get("import_path"), str):
            raise BadRequest(
                f"an application of {file} ({shown(application)}) has no import_path; write "
                "import_path: serve_app.app:build"
            )
        _refuse_unknown(application, APPLICATION_KEYS, f"an application of {file}")
        _check_import_path(application["import_path"], file)
    for key in ("name", "route_prefix"):
        values = [value for a in applications if (value := a.get(key, _default(key))) is not None]
        if len({*map(str, values)}) < len(values):
            raise BadRequest(f"two applications of {file} have the same {key}; give each its own")


def _default(key: str) -> str:
    return "default" if key == "name" else "/"


def _check_import_path(path: str, file: Path) -> None:
    """Raises BadRequest unless the module exists and, as far as its source shows, has that name."""
    module, separator, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not separator or not module or not name:
        raise BadRequest(
            f"the import_path {path!r} of {file} is not valid; write module:function, such as "
            "serve_app.app:build"
        )
    spec = _module_spec(module)
    if spec is None:
        raise BadRequest(
            f"the import_path {path!r} of {file} names a module that is not installed ({module}); correct "
            "it, or set PYTHONPATH to its folder"
        )
    names = _names(spec)
    if names is not None and name not in names:
        raise BadRequest(
            f"the import_path {path!r} of {file} is not valid: {module} has no {name!r}"
            f"{suggestion(name, names)}"
        )


def _module_spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a package above it does not exist, or is no package
        return None


def _names(spec: ModuleSpec) -> set[str] | None:
    """The names that the source of a module defines at its top; None when that cannot be seen."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    names: set[str] = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Import() | ast.ImportFrom():
                names.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
            case ast.Name(name, ast.Store()):
                names.add(name)
    return None if "*" in names else names
