"""Errors as answers: one table from error kind to HTTP status, one renderer per dialect."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Scope

from deployments.protocol.errors import Unauthorized, WeftError
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
    "model_failed": 503,  # final: the message says what the operator has to change
    "out_of_memory": 422,  # the request is too big for the device: a smaller one helps, a retry does not
    "cancelled": 409,
    "internal": 500,
}
RETRY_AFTER_S = {"rate_limited": 1.0, "overloaded": 2.0, "model_unavailable": 5.0}  # unless the error says
ERROR_KIND = "weft_error_kind"  # key in the scope's state
REPLICATE_PATHS = re.compile(r"/v1/(predictions|models/[^/]+/[^/]+/(predictions|versions))(/|$)")
A1111_PATHS = ("/sdapi/", "/controlnet/")
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def route_path(scope: Scope) -> str:
    """The path below the prefix that the app is mounted at."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))


def render(error: WeftError, scope: Scope, *, status: int | None = None) -> Response:
    """The error in the dialect of the called path. status: overrides the table."""
    scope.setdefault("state", {})[ERROR_KIND] = error.kind
    if REPLICATE_PATHS.match(route_path(scope)):
        return _render_replicate(error, status)
    if route_path(scope).startswith("/v1/"):
        return _render_openai(error, status)
    if route_path(scope).startswith(A1111_PATHS):
        return _render_a1111(error, status)
    return _render_native(error, status)


def error_kind_of(scope: Scope) -> str | None:
    """The kind of the error that was rendered for this call; None: none was."""
    kind: str | None = scope.get("state", {}).get(ERROR_KIND)
    return kind


def openai_body(error: WeftError, status: int | None = None) -> dict[str, Any]:
    """OpenAI's error object, which a stream carries as an event."""
    code = _openai_status(error) if status is None else status
    body = {
        "message": error.message,
        "type": OPENAI_TYPES.get(code, "server_error" if code >= 500 else "invalid_request_error"),
        "param": error.param,
        "code": "model_not_found" if code == 404 and error.param == "model" else error.kind,
    }
    return {"error": body}


def _render_native(error: WeftError, status: int | None) -> Response:
    code = STATUS[error.kind] if status is None else status
    body = ErrorBody(kind=error.kind, message=error.message, param=error.param, retryable=error.retryable)
    return _json_response({"error": body.model_dump()}, code, _retry_headers(error))


def _render_replicate(error: WeftError, status: int | None) -> Response:
    """As problem details (RFC 9457), which the package replicate reads."""
    code = STATUS[error.kind] if status is None else status
    body = {"title": error.kind, "status": code, "detail": error.message, "invalid_field": error.param}
    return _json_response(body, code, _retry_headers(error))


def _render_a1111(error: WeftError, status: int | None) -> Response:
    """As A1111's clients read it: what was wrong is in `detail`, some show `errors`."""
    code = STATUS[error.kind] if status is None else status
    body = {"error": error.kind, "detail": error.message, "body": error.param or "", "errors": error.message}
    return _json_response(body, code, _retry_headers(error))


def _render_openai(error: WeftError, status: int | None) -> Response:
    """As the openai SDK reads it; it repeats calls on 408, 409, 429 and 5xx unless a header forbids it."""
    code = _openai_status(error) if status is None else status
    retry = error.retryable and code != 504  # after a 504 the job is still running
    headers = {**_retry_headers(error), "x-should-retry": "true" if retry else "false"}
    return _json_response(openai_body(error, code), code, headers)


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


def _json_response(body: dict[str, Any], status: int, headers: dict[str, str]) -> Response:
    # json.dumps writes ASCII: a lone surrogate in a field's name cannot break the answer about it
    return Response(json.dumps(body), status, headers, media_type="application/json")
