"""Handlers for every expected exception of a route; unexpected ones end in ErrorBoundaryMiddleware."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.routing import Match
from starlette.websockets import WebSocket

from deployments.protocol.errors import BadRequest, Internal, NotFound, TooLarge, WeftError
from serve_app.api.errors import render, route_path
from serve_app.api.validation_messages import plain_message


def install(app: FastAPI) -> None:
    """Register the handlers. They return a Response for requests, and None for WebSockets."""
    app.add_exception_handler(WeftError, _on_weft_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_parameters)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_weft_error(connection: HTTPConnection, error: Exception) -> Any:
    assert isinstance(error, WeftError)
    return await _answer(connection, error)


async def _on_invalid_parameters(connection: HTTPConnection, error: Exception) -> Any:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return await _answer(connection, BadRequest(f"{name}: {plain_message(first)}", param=name))


async def _on_http_exception(connection: HTTPConnection, error: Exception) -> Any:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed_methods(connection))
    reason = _from_http_exception(connection, error, headers)
    response = await _answer(connection, reason, status=error.status_code)
    if response is not None:
        response.headers.update(headers)
    return response


def _allowed_methods(connection: HTTPConnection) -> list[str]:
    """The methods that some route of this path takes; the router names those of the first route only."""
    methods: set[str] = set()
    for route in connection.app.routes:
        for method in ("GET", "POST", "PATCH", "PUT", "DELETE"):
            if route.matches({**connection.scope, "method": method})[0] is Match.FULL:
                methods.add(method)
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def _from_http_exception(
    connection: HTTPConnection, error: HTTPException, headers: Mapping[str, str]
) -> WeftError:
    call = f"{connection.scope.get('method', 'GET')} {route_path(connection.scope)[:200]}"
    match error.status_code:
        case 404:
            return NotFound(f"there is no {call}; GET /docs lists what there is")
        case 405:
            return BadRequest(f"{call} is not allowed; use {headers['Allow']}")
        case 413:
            return TooLarge(str(error.detail))
        case status if status < 500:
            return BadRequest(str(error.detail))
        case _:
            return Internal(str(error.detail))


async def _answer(
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
