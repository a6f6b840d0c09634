"""Errors and warnings of a dialect of another service, with its own names of fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.errors import WeftError

Names = Mapping[str, str]  # a dialect's name of a field, by that of a GenerationRequest or its parts


def renamed_error(error: WeftError, names: Names) -> WeftError:
    """The error with the dialect's names of fields."""
    param = None if error.param is None else _renamed(error.param, names)
    return type(error)(_renamed(error.message, names), param=param, retry_after_s=error.retry_after_s)


def renamed_notice(notice: Adjustment, names: Names) -> Adjustment:
    """The warning with the dialect's names of fields."""
    return replace(notice, param=_renamed(notice.param, names), message=_renamed(notice.message, names))


def _renamed(text: str, names: Names) -> str:
    return re.sub(rf"\b({'|'.join(names)})\b", lambda match: names[match[0]], text)
