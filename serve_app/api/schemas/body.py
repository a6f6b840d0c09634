"""What all request bodies share: null means "not given", and a field may have several names."""

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import AliasChoices, BaseModel, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import Strict

ABOUT_A_FIELD = ("title", "description", "default", "examples")  # in a JSON schema, beside its type


class NullableFields(BaseModel):
    """Describes every field that may be left out as one that may be null: `without_nulls` reads it so."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The schema with null beside the type of every field that may be left out."""
        described = handler(core_schema)
        shape = handler.resolve_ref_schema(described)
        required = shape.get("required", [])
        for name, field in shape.get("properties", {}).items():
            if name not in required and {"type": "null"} not in field.get("anyOf", []):
                about = {key: field.pop(key) for key in ABOUT_A_FIELD if key in field}
                kinds = field.pop("anyOf", None) or [dict(field)]
                shape["properties"][name] = {"anyOf": [*kinds, {"type": "null"}], **about}
        return described


class RequestBody(NullableFields, Strict):
    """A body of a generating route, or a part of one."""

    @classmethod
    def prepared(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of a JSON object as they are validated."""
        return values


def without_nulls(value: Any) -> Any:
    """The JSON value with every object's nulls left out, at any depth: a null means "not given"."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def check_names(sent: Collection[str], schema: type[BaseModel]) -> None:
    """Raises BadRequest when a body has one field twice, under two of its names."""
    for names in field_names(schema).values():
        found = [name for name in names if name in sent]
        if len(found) > 1:
            raise BadRequest(
                f"{found[0]} and {found[1]} are two names of one field; send one of them", param=found[1]
            )


def field_names(schema: type[BaseModel]) -> dict[str, tuple[str, ...]]:
    """By field, the names under which a body may have it, the usual one first."""
    return {field: tuple(_names(field, info.validation_alias)) for field, info in schema.model_fields.items()}


def _names(field: str, alias: object) -> Iterator[str]:
    if isinstance(alias, AliasChoices):
        yield from (choice for choice in alias.choices if isinstance(choice, str))
    else:
        yield alias if isinstance(alias, str) else field
