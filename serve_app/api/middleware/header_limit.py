"""A limit on the size of a call's URL and headers together; the server itself has none."""

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.protocol.errors import TooLarge
from serve_app.api.middleware.send_error import send_error

MAX_HEADER_BYTES = 32 * 2**10


class HeaderLimitMiddleware:
    """Answers 431 to URLs and headers of more than MAX_HEADER_BYTES."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            size = len(scope["path"]) + len(scope.get("query_string", b""))
            size += sum(len(name) + len(value) for name, value in scope["headers"])
            if size > MAX_HEADER_BYTES:
                error = TooLarge(
                    f"address and headers are {size} bytes; at most {MAX_HEADER_BYTES} are taken"
                )
                await send_error(error, scope, receive, send, status=431)
                return
        await self.app(scope, receive, send)
