"""The mapping in a YAML file: a Serve config, a model card, the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from deployments.protocol.errors import BadRequest


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values in this file; none when it is empty.

    Raises BadRequest with one sentence that names the file, and the line where there is one.
    """
    text = _text(path)
    try:
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise BadRequest(f"{path}{line} is not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError):  # control characters, nesting, impossible dates
        raise BadRequest(f"{path} is not valid YAML; it should be a text file of keys and values") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadRequest(f"{path} should hold keys and values (key: value), and holds something else")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadRequest(f"there is no file {path}; correct the path") from None
    except IsADirectoryError:
        raise BadRequest(f"{path} is a folder; name a YAML file in it") from None
    except UnicodeDecodeError:
        raise BadRequest(f"{path} is not a text file in UTF-8; it should be YAML") from None
    except OSError as error:
        raise BadRequest(f"{path} cannot be read ({error.strerror}); correct it or its permissions") from None
