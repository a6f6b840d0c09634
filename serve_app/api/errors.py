"""Errors as answers: one table from kind to status, one renderer per dialect."""

import json
import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Scope
from starlette.websockets import WebSocket

from deployments.protocol.errors import BadRequest, Internal, NotFound, TooLarge, Unauthorized, WeftError
from serve_app.api.schemas.error import ErrorBody

STATUS: Mapping[str, int] = {
    "bad_request": 422,
    "too_large": 413,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "conflict": 409,
    "quota_exceeded": 429,
    "rate_limited": 429,
    "overloaded": 503,
    "model_unavailable": 503,
    "out_of_memory": 422,  # the request is too big for the device: smaller is the cure, not again
    "cancelled": 409,
    "internal": 500,
}
RETRY_AFTER_S = {
    "rate_limited": 1.0,
    "overloaded": 2.0,
    "model_unavailable": 5.0,
}  # where the error says nothing
REFUSAL = "weft_refusal"  # in a call's state
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def route_path(scope: Scope) -> str:
    """The path below the prefix we are mounted at."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))


def render(error: WeftError, scope: Scope, *, status: int | None = None) -> Response:
    """The error in the dialect of the path that was called. status: where the table does not fit."""
    scope.setdefault("state", {})[REFUSAL] = error.kind
    if route_path(scope).startswith("/v1/"):
        return _openai(error, status)
    return _native(error, status)


def error_kind_of(scope: Scope) -> str | None:
    """The kind of the error that was rendered for this call, if one was."""
    kind: str | None = scope.get("state", {}).get(REFUSAL)
    return kind


def _native(error: WeftError, status: int | None) -> Response:
    code = STATUS[error.kind] if status is None else status
    refusal = ErrorBody(kind=error.kind, message=error.message, param=error.param, retryable=error.retryable)
    return _answer({"error": refusal.model_dump()}, code, _retry_headers(error))


def _openai(error: WeftError, status: int | None) -> Response:
    """As the openai SDK reads it; it repeats 408, 409, 429 and 5xx unless told not to."""
    code = _openai_status(error) if status is None else status
    again = error.retryable and code != 504  # what waited long enough for a 504 is still running
    headers = {**_retry_headers(error), "x-should-retry": "true" if again else "false"}
    return _answer(openai_body(error, code), code, headers)


def openai_body(error: WeftError, status: int | None = None) -> dict[str, Any]:
    """The error in OpenAI's words; inside of a stream it is all there is."""
    code = _openai_status(error) if status is None else status
    body = {
        "message": error.message,
        "type": OPENAI_TYPES.get(code, "server_error" if code >= 500 else "invalid_request_error"),
        "param": error.param,
        "code": "model_not_found" if code == 404 and error.param == "model" else error.kind,
    }
    return {"error": body}


def _openai_status(error: WeftError) -> int:
    status = STATUS[error.kind]
    return 400 if status == 422 else status


def _retry_headers(error: WeftError) -> dict[str, str]:
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else {}
    wait_s = RETRY_AFTER_S.get(error.kind) if error.retry_after_s is None else error.retry_after_s
    if wait_s is not None:
        headers["Retry-After"] = str(math.ceil(wait_s))
        headers["retry-after-ms"] = str(math.ceil(wait_s * 1000))
    return headers


def _answer(body: dict[str, Any], status: int, headers: dict[str, str]) -> Response:
    # json.dumps writes ASCII: a lone surrogate in a field's name cannot break the answer about it
    return Response(json.dumps(body), status, headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Give every error that may leave a route its answer; a bug is the envelope's (guards.py)."""
    app.add_exception_handler(WeftError, _on_weft_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_parameters)
    app.add_exception_handler(HTTPException, _on_http_exception)


# These handlers serve requests, where they return a Response, and sockets, where they return None.


async def _on_weft_error(connection: HTTPConnection, error: Exception) -> Any:
    assert isinstance(error, WeftError)
    return await _refuse(connection, error)


async def _on_invalid_parameters(connection: HTTPConnection, error: Exception) -> Any:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return await _refuse(connection, BadRequest(f"{name}: {_plain(first)}", param=name))


async def _on_http_exception(connection: HTTPConnection, error: Exception) -> Any:
    assert isinstance(error, HTTPException)
    where = f"{connection.scope.get('method', 'GET')} {route_path(connection.scope)[:200]}"
    match error.status_code:
        case 404:
            ours: WeftError = NotFound(f"there is no {where}; GET /docs lists what there is")
        case 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            ours = BadRequest(f"{where} is not allowed; use {allowed}")
        case 413:
            ours = TooLarge(str(error.detail))
        case status if status < 500:
            ours = BadRequest(str(error.detail))
        case _:
            ours = Internal(str(error.detail))
    response = await _refuse(connection, ours, status=error.status_code)
    if response is not None and error.headers:
        response.headers.update(error.headers)
    return response


async def _refuse(
    connection: HTTPConnection, error: WeftError, *, status: int | None = None
) -> Response | None:
    response = render(error, connection.scope, status=status)
    if not isinstance(connection, WebSocket):
        return response
    if "websocket.http.response" in connection.scope.get("extensions", {}):
        await connection.send_denial_response(response)
    else:
        await connection.close(4000 + response.status_code, error.message[:100])
    return None


def from_validation(error: ValidationError, schema: type[BaseModel]) -> BadRequest:
    """What is wrong with a body, field by field, and what would be right."""
    faults = error.errors(include_url=False, include_input=False)
    told = "; ".join(_fault(fault, schema) for fault in faults[:5])
    rest = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    return BadRequest(told + rest, param=_param(faults[0]))


def _param(fault: Mapping[str, Any]) -> str | None:
    name = ".".join(str(part) for part in fault["loc"])[:100]
    return name or None


def _fault(fault: Mapping[str, Any], schema: type[BaseModel]) -> str:
    name = _param(fault)
    if name is None:
        return _plain(fault)
    if fault["type"] == "missing":
        return f"{name} is missing"
    if fault["type"] == "extra_forbidden":
        fields = sorted(schema.model_fields)
        near = get_close_matches(name, fields, n=1)
        cure = f"did you mean {near[0]}?" if near else f"there is {', '.join(fields)}"
        return f"{name} is not a field of this request; {cure}"
    return f"{name}: {_plain(fault)}"


def _plain(fault: Mapping[str, Any]) -> str:
    """pydantic's sentence without its prefixes."""
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
