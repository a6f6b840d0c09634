"""A request id for every call: in its log lines, in its state, and in the answer's X-Request-Id."""

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.protocol import log_context
from deployments.protocol.log_context import LogContext

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
HTTP_START = "http.response.start"
WEBSOCKET_STARTS = ("websocket.http.response.start",)


class RequestIdMiddleware:
    """Keeps the caller's X-Request-Id when it is well formed, and makes one otherwise.

    Ray Serve's proxy gives every HTTP call without an id one, and adds the call's id to the answer itself.
    """

    def __init__(self, app: ASGIApp, *, sent_by_proxy: bool = False) -> None:
        """sent_by_proxy: this app runs behind Ray Serve's proxy."""
        self.app = app
        self.response_starts = WEBSOCKET_STARTS if sent_by_proxy else (HTTP_START, *WEBSOCKET_STARTS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope = {**scope, "state": {**scope.get("state", {}), "request_id": request_id}}

        async def send_with_id(message: Message) -> None:
            if message["type"] in self.response_starts:
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        bound = log_context.bind(LogContext(request_id=request_id))
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            log_context.unbind(bound)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
