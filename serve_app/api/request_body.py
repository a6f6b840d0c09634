"""Request bodies as schemas, from JSON or from a form; every fault is named and nothing is guessed."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from deployments.protocol.errors import BadRequest
from deployments.protocol.request import MAX_LORAS, MAX_REFERENCES
from serve_app.api.json_shape import check_json_shape
from serve_app.api.schemas.body import RequestBody, check_names, field_names, without_nulls
from serve_app.api.schemas.lora_fields import AS_TEXT
from serve_app.api.state import api_state
from serve_app.api.validation_messages import bad_request
from serve_app.storage.spooled_file import SpooledFile

Body = TypeVar("Body", bound=BaseModel)

MAX_FORM_FIELDS = 64
LARGE_BYTES = 256 * 2**10  # from here on a body is parsed beside the event loop


async def read_json(http_request: Request, schema: type[Body]) -> Body:
    """The JSON body as `schema`. Raises BadRequest, or 415 for another content type."""
    if not _is_json(_content_type(http_request)):
        raise HTTPException(415, "send JSON, with the header Content-Type: application/json")
    # not http_request.body(), which would keep it in memory for as long as the call is open
    body = b"".join([part async for part in http_request.stream()])
    parse = partial(_parsed, body, schema, api_state(http_request).settings.max_json_depth)
    if len(body) < LARGE_BYTES:
        return parse()
    return await asyncio.to_thread(parse)


async def read_json_or_form(http_request: Request, schema: type[Body], files: tuple[str, ...]) -> Body:
    """The body as `schema`, from JSON or from a form whose `files` fields may be uploads.

    A schema with the field `lora_files` takes up to MAX_LORAS further uploads, under any names. A file field
    that is a list takes up to MAX_REFERENCES uploads, each a part of its own with that name.
    """
    async with opened_body(http_request, schema, files) as body:
        return body


@asynccontextmanager
async def opened_body(
    http_request: Request, schema: type[Body], files: tuple[str, ...], on_disk: tuple[str, ...] = ()
) -> AsyncIterator[Body]:
    """As read_json_or_form; uploads in the fields `on_disk` are a SpooledFile, which is there while this is
    open.
    """
    content_type = _content_type(http_request)
    if content_type != "multipart/form-data":
        if not _is_json(content_type):
            raise HTTPException(
                415, "send JSON with Content-Type: application/json, or a multipart/form-data form"
            )
        yield await read_json(http_request, schema)
        return
    max_lora_files = MAX_LORAS if "lora_files" in schema.model_fields else 0
    fields = {name: field for field in files for name in field_names(schema)[field]}
    lists = frozenset(field for field in files if _is_list(schema, field))
    max_files = len(fields) + max_lora_files + MAX_REFERENCES * len(lists)
    async with http_request.form(max_files=max_files, max_fields=MAX_FORM_FIELDS) as form:
        texts, uploads = await _read_form(
            form, fields, any_files=bool(max_lora_files), on_disk=on_disk, lists=lists
        )
        check_names([*texts, *uploads], schema)
        try:
            body = schema.model_validate_strings(texts)
        except ValidationError as error:
            raise bad_request(error, schema) from None
        lora_files = {name: uploads.pop(name) for name in list(uploads) if name not in files}
        yield body.model_copy(update={**uploads, "lora_files": lora_files} if max_lora_files else uploads)


def _parsed(body: bytes, schema: type[Body], max_depth: int) -> Body:
    """Raises BadRequest, and HTTPException for what is no request at all."""
    try:
        check_json_shape(body, max_depth)
    except BadRequest as error:
        raise HTTPException(400, error.message) from None
    try:
        # Rust's parser: endless numbers, lone surrogates and deep nesting are faults, not crashes
        values = without_nulls(from_json(body))
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON ({error}); send one object") from None
    if isinstance(values, dict):
        values = schema.prepared(values) if issubclass(schema, RequestBody) else values
        check_names(values, schema)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise bad_request(error, schema) from None


def documented(schema: type[BaseModel], files: tuple[str, ...] = ()) -> dict[str, Any]:
    """openapi_extra of a route that reads its body by the functions above. files: file fields of its form."""
    shape = schema.model_json_schema()
    shape = _inline(shape, shape.pop("$defs", {}))
    content: dict[str, Any] = {"application/json": {"schema": shape}}
    if files:
        content["multipart/form-data"] = {"schema": json.loads(json.dumps(shape))}
        for name in files:
            content["multipart/form-data"]["schema"]["properties"][name] = {
                "type": "string",
                "format": "binary",
            }
    return {"requestBody": {"required": True, "content": content}}


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    """The schema with inner models in place of references, which would point outside of the route."""
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inline(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: _inline(value, definitions) for key, value in node.items()}


def _is_list(schema: type[BaseModel], field: str) -> bool:
    annotation = schema.model_fields[field].annotation
    return any(get_origin(kind) is list for kind in (annotation, *get_args(annotation)))


async def _read_form(
    form: FormData,
    files: Mapping[str, str],
    *,
    any_files: bool,
    on_disk: tuple[str, ...],
    lists: frozenset[str],
) -> tuple[dict[str, str], dict[str, bytes | SpooledFile | list[bytes]]]:
    """Text fields by name, and uploads by field. Empty ones are left out: a form sends every field.

    files: by name of a file field, the field of the schema. any_files: whether uploads may have names that
    are not in `files`. lists: fields that may be there several times.
    """
    texts: dict[str, str] = {}
    uploads: dict[str, bytes | SpooledFile | list[bytes]] = {}
    for name, value in form.multi_items():
        if name.startswith("loras["):
            raise BadRequest(
                f"{name[:100]} does not say which weight belongs to which LoRA; {AS_TEXT}", param="loras"
            )
        field = files.get(name, name)
        if field in lists and isinstance(value, UploadFile):
            if value.filename or value.size:
                _append(uploads, field, await value.read())
            continue
        if name in texts or field in uploads:
            raise BadRequest(f"{name[:100]} is there twice; send it once", param=name[:100])
        if isinstance(value, UploadFile):
            if not (value.filename or value.size):
                continue  # a file field of a web page in which no file was chosen
            if name not in files and not any_files:
                raise BadRequest(f"{name[:100]} cannot be a file; files are {', '.join(files)}")
            uploads[field] = SpooledFile(value.file) if field in on_disk else await value.read()
        elif value:
            texts[name] = _check_text(name, value)
    return texts, uploads


def _append(uploads: dict[str, bytes | SpooledFile | list[bytes]], field: str, data: bytes) -> None:
    """Add a file to a list. Raises BadRequest when it is full."""
    known = uploads.setdefault(field, [])
    assert isinstance(known, list), "a list field has no other uploads"
    if len(known) == MAX_REFERENCES:
        raise BadRequest(f"{field} has more than {MAX_REFERENCES} files; send fewer", param=field)
    known.append(data)


def _check_text(name: str, value: str) -> str:
    """The value. Raises BadRequest for lone surrogates, which a part's charset can produce."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{name[:100]} is not valid text; send UTF-8", param=name[:100]) from None
    return value


def _content_type(http_request: Request) -> str:
    return http_request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _is_json(content_type: str) -> bool:
    return content_type == "application/json" or content_type.endswith("+json")
