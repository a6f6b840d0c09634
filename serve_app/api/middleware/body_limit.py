"""A limit on the size of request bodies, counted while the route reads them."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.protocol.errors import TooLarge
from serve_app.api.errors import render, route_path

UPLOADS_PATH = "/api/loras"  # takes a form with a file
SMALL_PATHS = ("/auth/", "/admin/")  # of which the first are read before a key is known
SMALL_BYTES = 64 * 2**10


class BodyLimitMiddleware:
    """Refuses a body that states a size over the limit at once, and any other where it exceeds it.

    Nothing is read here: a route reads its body after its caller is known, so a stranger costs no memory.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_upload_bytes: int) -> None:
        """max_upload_bytes: of a form with a LoRA, which stays on disk."""
        self.app = app
        self.max_bytes = max_bytes
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = self._limit(route_path(scope), headers.get("content-type", "").lower())
        declared = headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 15 or int(declared) > limit):
            await render(_too_large(limit), scope)(scope, receive, send)
        else:
            await self.app(scope, _counted(receive, limit), send)

    def _limit(self, path: str, content_type: str) -> int:
        if path == UPLOADS_PATH and content_type.startswith("multipart/"):
            return self.max_upload_bytes
        return min(self.max_bytes, SMALL_BYTES) if path.startswith(SMALL_PATHS) else self.max_bytes


def _counted(receive: Receive, max_bytes: int) -> Receive:
    """A receive that raises TooLarge, in the route that reads the body, after max_bytes."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise _too_large(max_bytes)
        return message

    return counted


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the body is over {max_bytes} bytes; send fewer or smaller files")
