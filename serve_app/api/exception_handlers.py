"""Handlers for every expected exception of a route; unexpected ones end in ErrorBoundaryMiddleware."""

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response
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
    response = await _answer(connection, _from_http_exception(connection, error), status=error.status_code)
    if response is not None and error.headers:
        response.headers.update(error.headers)
    return response


def _from_http_exception(connection: HTTPConnection, error: HTTPException) -> WeftError:
    call = f"{connection.scope.get('method', 'GET')} {route_path(connection.scope)[:200]}"
    match error.status_code:
        case 404:
            return NotFound(f"there is no {call}; GET /docs lists what there is")
        case 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            return BadRequest(f"{call} is not allowed; use {allowed}")
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
