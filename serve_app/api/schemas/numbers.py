"""Numbers as callers write them: 24.0 for 24, -1 for a random seed, 30000/1001 frames a second."""

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo, WithJsonSchema

from deployments.protocol.request import MAX_SEED

MAX_EXACT = 2**53  # whole numbers up to it are exact in the floats of JSON parsers
INTEGER = re.compile(r"([+-]?[0-9]{1,20})(?:\.0*)?")
DECIMAL = re.compile(r"[+-]?[0-9]{1,9}(?:\.[0-9]*)?")
RATIO = re.compile(r"([0-9]{1,9})/([1-9][0-9]{0,8})")
RANDOM = -1  # as a seed


def in_form(info: ValidationInfo) -> bool:
    """Whether the value is text of a form, as pydantic's model_validate_strings reads it."""
    mode: str = info.mode  # its type leaves "string" out
    return mode == "string"


def _integral(value: Any) -> Any:
    """24 for 24.0; all else is left to pydantic. Raises ValueError."""
    if isinstance(value, float) and value.is_integer():
        if abs(value) > MAX_EXACT:
            raise ValueError("is too large to be exact with a decimal point; write it without one")
        return int(value)
    return value


def _integer(value: Any, info: ValidationInfo) -> Any:
    """The same, and 24 for the text of a form that is 24 or 24.0."""
    return _from_text(value) if in_form(info) else _integral(value)


def _from_text(value: Any) -> Any:
    match = INTEGER.fullmatch(value.strip()) if isinstance(value, str) else None
    return value if match is None else int(match[1])


def _seed(value: Any) -> Any:
    """None for every spelling of "random"; a number for digits as text, which keep all bits of a seed."""
    if isinstance(value, str):
        value = None if value.strip().lower() in ("", "random") else _from_text(value)
        if isinstance(value, str):
            raise ValueError("must be a whole number, or -1 for a random one")
    value = _integral(value)
    return None if value == RANDOM else value


def _end_seed(value: Any) -> Any:
    """As _seed, but RANDOM stays: without one, the end of a video has the seed after the first."""
    seed = _seed(value)
    return RANDOM if seed is None and value not in (None, "") else seed


def _fps(value: Any, info: ValidationInfo) -> Any:
    """The number of a ratio such as 30000/1001, whole where it is whole."""
    if isinstance(value, str):
        ratio = RATIO.fullmatch(value.strip())
        number = DECIMAL.fullmatch(value.strip()) if in_form(info) else None
        value = int(ratio[1]) / int(ratio[2]) if ratio else float(number[0]) if number else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("must be a number of frames a second, such as 24, 29.97 or 30000/1001")
    return _integral(value)


Int = Annotated[int, BeforeValidator(_integer)]
SEED_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "integer", "minimum": RANDOM, "maximum": MAX_SEED},
            {"type": "string", "pattern": r"^(random|-1|[0-9]{1,19})?$"},
            {"type": "null"},
        ]
    }
)
Seed = Annotated[int | None, BeforeValidator(_seed), SEED_SCHEMA]
EndSeed = Annotated[int | None, BeforeValidator(_end_seed), SEED_SCHEMA]
Fps = Annotated[
    int | float,
    BeforeValidator(_fps),
    WithJsonSchema(
        {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[0-9]{1,9}/[1-9][0-9]{0,8}$"}]}
    ),
]
