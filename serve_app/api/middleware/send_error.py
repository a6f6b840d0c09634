"""An error as the answer of a middleware, for requests and for WebSockets."""

from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketClose

from deployments.protocol.errors import Internal, WeftError
from serve_app.api.errors import render


async def send_error(
    error: WeftError, scope: Scope, receive: Receive, send: Send, *, status: int | None = None
) -> None:
    """Answer with the error in the dialect of the path, or close the WebSocket with its message."""
    if scope["type"] == "http":
        await render(error, scope, status=status)(scope, receive, send)
    else:
        code = 1011 if isinstance(error, Internal) else 4403
        await WebSocketClose(code, error.message[:100])(scope, receive, send)
