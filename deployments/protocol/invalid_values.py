"""What is wrong with a value of a setting, a model card or a Serve config, and what would be right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

SHOWN_CHARS = 60  # of a value that is not valid
MAX_SHOWN = 3  # values of one file
# pydantic's kinds of errors
BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
SECRET = "secret"  # our own kind: the value is not shown
WHOLE_NUMBER = {"int_parsing", "int_type", "int_from_float", "int_parsing_size"}
NUMBER = {"float_parsing", "float_type", "finite_number"}
WORDS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "missing": "is missing",
    "extra_forbidden": "is unknown",
}


def wrong_values(error: ValidationError, known: Iterable[str] = ()) -> str:
    """The first values that are not valid, each with its key. known: keys that are suggested for others."""
    faults = error.errors(include_url=False)
    texts = [_located(fault, [*known]) for fault in faults[:MAX_SHOWN]]
    if len(faults) > MAX_SHOWN:
        texts.append(f"{len(faults) - MAX_SHOWN} more")
    return "; ".join(texts)


def what_is_right(fault: Mapping[str, Any], *, duration: bool = False) -> str:
    """What the value must be; it follows the value's name. duration: whether it is a number of seconds."""
    limits = fault.get("ctx") or {}
    kind, message = str(fault["type"]), str(fault["msg"])
    if kind in BOUNDS:
        words, limit = BOUNDS[kind]
        return f"must be {words} {limits[limit]:g}"
    if kind in WHOLE_NUMBER:
        return f"must be a whole number{' of seconds, without a unit' if duration else ''}"
    if kind in NUMBER:
        return f"must be a number{' of seconds, without a unit' if duration else ''}"
    if "min_length" in limits:
        return f"must have at least {limits['min_length']} characters"
    if kind in ("value_error", SECRET):
        return message.removeprefix("Value error, ")
    return WORDS.get(kind) or f"is not valid: {message[:1].lower()}{message[1:]}"


def shown(value: object) -> str:
    """The value as it was given, shortened."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the known name that is nearest to this one; empty when none is near."""
    near = get_close_matches(name, [*known], n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def _located(fault: Mapping[str, Any], known: list[str]) -> str:
    name = ".".join(str(part) for part in fault["loc"])
    text = what_is_right(fault)
    if fault["type"] == "extra_forbidden":
        return f"the key {name} is unknown{suggestion(str(fault['loc'][-1]), known)}"
    if not name:
        return text
    if fault["type"] in ("missing", SECRET):
        return f"{name} {text}"
    return f"{name} ({shown(fault['input'])}) {text}"
