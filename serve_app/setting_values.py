"""Kinds of values that settings have, and a sentence for a value that is none."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, get_args
from urllib.parse import unquote, urlsplit

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import NoDecode

from deployments.protocol.card import Dtype, Quantisation
from deployments.protocol.invalid_values import shown, suggestion, what_is_right

HOST = re.compile(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*\.?")
ORIGIN = re.compile(r"https?://([\w.-]+|\[[0-9a-f:]+\])(:\d{1,5})?", re.IGNORECASE)
DEVICE = re.compile(r"cuda(:\d+)?|mps|cpu")
PRECISIONS = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}  # other names
HOSTS_FORM = "names of hosts, without scheme, port and path: example.org, *.example.org, or *"
NETWORKS_FORM = "IP addresses and networks: 10.0.0.7, 10.0.0.0/8, 2001:db8::/32"
ORIGINS_FORM = "addresses of web sites, scheme and host and port only: https://app.example.org, or *"
ALIASES_FORM = "pairs NAME=MODEL: dall-e-3=flux.1-dev, sora-2=tiny-wan; * for every unknown name"
MASK = "***"
# variables whose values, or whose passwords, are never printed
SECRET_NAMES = re.compile(
    r"(SECRET|PASSWORD|TOKEN|API_KEY|ACCESS_KEY(?!_ID))(?!.*(PATH|FILE)$)", re.IGNORECASE
)
URL_NAMES = re.compile(r"_URL$", re.IGNORECASE)
MIN_MASKED_CHARS = 6  # a shorter value would be masked in ordinary words


def _split_names(value: object) -> object:
    return [name for name in re.split(r"[,;\s]+", value) if name] if isinstance(value, str) else value


def _split_hosts(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.strip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError(f"is not a valid JSON list; write {HOSTS_FORM}") from None
    return _split_names(value)


def _check_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    for name in hosts:
        if not HOST.fullmatch(name.strip()):
            raise ValueError(f"holds {shown(name)}; write {HOSTS_FORM}")
    return tuple(name.strip() for name in hosts)


def _checked_hosts(value: object) -> object:
    hosts = _split_hosts(value)
    if isinstance(hosts, list | tuple) and all(isinstance(name, str) for name in hosts):
        return _check_hosts(tuple(hosts))
    raise ValueError(f"must be {HOSTS_FORM}")


Hosts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_checked_hosts)]
"""Names of hosts: separated by commas or blanks, or as a JSON list."""


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_names)]
"""Words separated by commas or blanks."""


def _checked_networks(value: object) -> object:
    texts = _split_names(value)
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"must be {NETWORKS_FORM}")
    for text in filter(None, texts):
        try:
            network = ip_network(text)
        except ValueError as error:
            raise ValueError(f"holds {shown(text)} ({error}); write {NETWORKS_FORM}") from None
        if not network.prefixlen:
            raise ValueError(
                f"holds {text}, which would trust every caller; write the proxies' own addresses"
            )
    return tuple(filter(None, texts))


Networks = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_checked_networks)]
"""IP addresses and networks: separated by commas or blanks, or a list."""


def _checked_origins(value: object) -> object:
    texts = _split_names(value)
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"must be {ORIGINS_FORM}")
    origins = tuple(text.rstrip("/") for text in texts if text)
    for origin in origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise ValueError(f"holds {shown(origin)}; write {ORIGINS_FORM}")
    return origins


Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_checked_origins)]
"""Web sites: separated by commas or blanks, or a list."""


def _checked_aliases(value: object) -> object:
    if isinstance(value, str):
        pairs = [text.partition("=") for text in re.split(r"[,;\s]+", value) if text]
        if not all(name and mark and model for name, mark, model in pairs):
            raise ValueError(f"must be {ALIASES_FORM}")
        return {name: model for name, _, model in pairs}
    if isinstance(value, Mapping) and all(
        isinstance(text, str) and text for text in (*value, *value.values())
    ):
        return dict(value)
    raise ValueError(f"must be {ALIASES_FORM}")


Aliases = Annotated[dict[str, str], NoDecode, BeforeValidator(_checked_aliases)]
"""Names of models and the models they stand for."""

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A duration."""


def _checked_folder(value: object) -> object:
    if isinstance(value, str) and "://" in value:
        raise ValueError("must be a folder; a model at an address is named by weights.path of its card")
    return value


Folder = Annotated[Path, BeforeValidator(_checked_folder)]
"""A folder of this machine."""


def _checked_device(value: object) -> object:
    if isinstance(value, str) and DEVICE.fullmatch(name := value.strip().lower()):
        return name
    raise ValueError("must be cuda, cuda:1 (a GPU by its number), mps or cpu")


DeviceName = Annotated[str, BeforeValidator(_checked_device)]
"""A device as torch names it; an AMD GPU is cuda, too."""


def _checked_precision(value: object) -> object:
    name = value.strip().lower().removeprefix("torch.") if isinstance(value, str) else ""
    name = PRECISIONS.get(name, name)
    if name not in (*get_args(Dtype), *get_args(Quantisation)):
        raise ValueError(
            f"must be {', '.join(get_args(Dtype))}, or the form of the weights: "
            f"{', '.join(get_args(Quantisation))}"
        )
    return name


Precision = Annotated[Dtype | Quantisation, BeforeValidator(_checked_precision)]
"""A dtype, or the form of quantised weights; by torch's name, or another that is in use."""


def unknown_variables(fields: Mapping[str, FieldInfo]) -> str | None:
    """A sentence on the variables WEFT_... of the environment that are no settings; None without one."""
    known = {f"WEFT_{name.upper()}" for name in fields}
    unknown = sorted(n for n in os.environ if n.upper().startswith("WEFT_") and n.upper() not in known)
    if not unknown:
        return None
    named = ", ".join(unknown)
    hint = "".join(suggestion(name.upper(), known) for name in unknown[:1])
    return f"unknown environment variable {named}{hint or '; serve_app/settings.py lists the settings'}"


def ignored_variables(fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    """Sentences on variables of the environment that look like settings and are none: other programs have
    variables MODEL_..., so they are no error."""
    known = {alias for field in fields.values() for alias in _aliases(field) if alias.startswith("MODEL_")}
    for name in sorted(os.environ):
        if name.upper().startswith("MODEL_") and name.upper() not in known:
            hint = suggestion(name.upper(), known) or f"; those are {', '.join(sorted(known))}"
            yield f"warning: {name} is no setting and has no effect{hint}"
    if os.environ.get("DATABASE_URL"):
        yield (
            "warning: DATABASE_URL is set and not used: jobs and their history are kept in Valkey "
            "(REDIS_URL); docs/decisions/0008-history-in-valkey.md says why"
        )


def invalid_settings(
    error: ValidationError, fields: Mapping[str, FieldInfo], given: Mapping[str, object]
) -> str:
    """One sentence on the settings that are not valid, each under the name by which it was set.

    given: those that were passed as arguments. Values of secrets are not in it.
    """
    return "; ".join(_sentence(fault, fields, given) for fault in error.errors(include_url=False))


def without_secrets(text: str) -> str:
    """The text without the values of secrets that are in the environment, and passwords of its URLs."""
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


def _secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name):
            found = [value]
        elif URL_NAMES.search(name) and "@" in value:
            password = value.partition("://")[2].rpartition("@")[0].partition(":")[2]
            found = [password, unquote(password), *_password(value)]
        else:
            continue
        yield from (secret for secret in found if len(secret) >= MIN_MASKED_CHARS)


def _password(url: str) -> list[str]:
    try:
        password = urlsplit(url).password
    except ValueError:
        return []
    return [] if password is None else [password, unquote(password)]


def _sentence(fault: Mapping[str, Any], fields: Mapping[str, FieldInfo], given: Mapping[str, object]) -> str:
    if not fault["loc"]:  # several settings together
        return what_is_right(fault)
    key = str(fault["loc"][0])
    name = next((name for name, field in fields.items() if key == name or key in _aliases(field)), None)
    if name is None:
        where = "the Serve config's args.settings" if key in given else "configs/service.yaml"
        return f"the setting {key} of {where} is unknown{suggestion(key, fields)}"
    field = fields[name]
    text = what_is_right(fault, duration=name.endswith("_s"))
    value = "" if SecretStr in _parts(field.annotation) else f" ({shown(fault['input'])})"
    return f"{_set_as(name, field, given)}{value} {text}"


def _set_as(name: str, field: FieldInfo, given: Mapping[str, object]) -> str:
    """The variable or the key that holds this setting."""
    if name in given:
        return f"the setting {name}"
    present = {variable.upper(): variable for variable, value in os.environ.items() if value}
    for variable in [*_aliases(field), f"WEFT_{name.upper()}"]:
        if variable.upper() in present:
            return present[variable.upper()]
    return f"{name} in configs/service.yaml"


def _aliases(field: FieldInfo) -> list[str]:
    alias = field.validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else []


def _parts(annotation: object) -> tuple[object, ...]:
    return getattr(annotation, "__args__", (annotation,))
