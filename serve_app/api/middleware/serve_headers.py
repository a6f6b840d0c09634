"""Removes the headers by which a client could control Ray Serve."""

from starlette.types import ASGIApp, Receive, Scope, Send

# Serve obeys both: a client could disable its timeout and its detection of disconnected clients.
SERVE_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")


class ServeHeadersMiddleware:
    """Passes every call on without Ray Serve's control headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            kept = [(name, value) for name, value in scope["headers"] if name not in SERVE_HEADERS]
            scope = {**scope, "headers": kept}
        await self.app(scope, receive, send)
