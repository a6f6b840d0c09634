"""pydantic's validation errors as one sentence: which field is wrong, and what would be right."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from deployments.protocol.errors import BadRequest
from serve_app.api.field_suggestions import suggestion
from serve_app.api.schemas.body import field_names

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
        case "model_type":
            return 'the body must be one JSON object, such as {"prompt": "a red fox"}'
        case "list_type":
            return "should be a valid array"
        case "finite_number":
            return "must be a finite number; NaN and numbers beyond 1e308 are not"
        case _:
            return message


def _field_name(fault: Mapping[str, Any]) -> str | None:
    name = ".".join(str(part) for part in fault["loc"])[:100]
    return name or None


def _inner(schema: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel]:
    """The schema of the object at this path in a body; the last known one where it cannot be found."""
    for part in path:
        names = field_names(schema).items()
        field = next((field for field, known in names if part in known), None)
        if field is not None:
            schema = next(_schemas_in(schema.model_fields[field].annotation), schema)
    return schema


def _schemas_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _schemas_in(argument)


def _describe(fault: Mapping[str, Any], schema: type[BaseModel]) -> str:
    name = _field_name(fault)
    if name is None:
        return plain_message(fault)
    if fault["type"] == "missing":
        return f"{name} is missing"
    if fault["type"] == "extra_forbidden":
        *path, last = fault["loc"]
        return f"{name} is not a field of this request; {suggestion(str(last), _inner(schema, path))}"
    return f"{name}: {plain_message(fault)}"
