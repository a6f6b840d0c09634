"""pydantic's validation errors as one sentence: which field is wrong, and what would be right."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from deployments.protocol.errors import BadRequest

MAX_FAULTS = 5  # in one message


def bad_request(error: ValidationError, schema: type[BaseModel]) -> BadRequest:
    """The first faults of the body, field by field. schema: of the body, for its field names."""
    faults = error.errors(include_url=False, include_input=False)
    message = "; ".join(_describe(fault, schema) for fault in faults[:MAX_FAULTS])
    rest = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
    return BadRequest(message + rest, param=_field_name(faults[0]))


def plain_message(fault: Mapping[str, Any]) -> str:
    """pydantic's message without its prefixes, and in our words where those are clearer."""
    message = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    match fault["type"]:
        case "json_invalid":
            return f"the body is not valid JSON ({message.removeprefix('Invalid JSON: ')}); send one object"
        case "model_type":
            return 'the body must be one JSON object, such as {"prompt": "a red fox"}'
        case "finite_number":
            return "must be a finite number; NaN and numbers beyond 1e308 are not"
        case _:
            return message


def _field_name(fault: Mapping[str, Any]) -> str | None:
    name = ".".join(str(part) for part in fault["loc"])[:100]
    return name or None


def _describe(fault: Mapping[str, Any], schema: type[BaseModel]) -> str:
    name = _field_name(fault)
    if name is None:
        return plain_message(fault)
    if fault["type"] == "missing":
        return f"{name} is missing"
    if fault["type"] == "extra_forbidden":
        fields = sorted(schema.model_fields)
        near = get_close_matches(name, fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(fields)}"
        return f"{name} is not a field of this request; {hint}"
    return f"{name}: {plain_message(fault)}"
