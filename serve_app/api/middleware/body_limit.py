"""A limit on the size of request bodies, counted while the route reads them."""

import asyncio
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.protocol.errors import TooLarge
from serve_app.api.errors import render, route_path

UPLOADS_PATH = "/api/loras"  # takes a form with a file
SMALL_PATHS = ("/auth/", "/admin/")  # of which the first are read before a key is known
SMALL_BYTES = 64 * 2**10
LARGE_BYTES = 2**20  # from here on few bodies are in memory at once
STALL_S = 30.0  # without a byte of an unfinished body


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
        limit = self._limit(route_path(scope), headers)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 15 or int(declared) > limit):
            await render(_too_large(limit), scope)(scope, receive, send)
        else:
            await self.app(scope, _counted(receive, limit), send)

    def _limit(self, path: str, headers: Headers) -> int:
        if _is_upload(path, headers):
            return self.max_upload_bytes
        return min(self.max_bytes, SMALL_BYTES) if path.startswith(SMALL_PATHS) else self.max_bytes


def is_large(connection: HTTPConnection) -> bool:
    """Whether the body may take much memory: it states so, or states no size. Files on disk do not count."""
    headers = connection.headers
    declared = headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() else LARGE_BYTES * ("transfer-encoding" in headers)
    return size >= LARGE_BYTES and not _is_upload(route_path(connection.scope), headers)


def _is_upload(path: str, headers: Mapping[str, str]) -> bool:
    return path == UPLOADS_PATH and headers.get("content-type", "").lower().startswith("multipart/")


def _counted(receive: Receive, max_bytes: int) -> Receive:
    """A receive that raises TooLarge after max_bytes, and HTTPException for a body that stalls."""
    received, complete = 0, False

    async def counted() -> Message:
        nonlocal received, complete
        if complete:  # what follows is the disconnect, for which a long answer waits
            return await receive()
        try:
            async with asyncio.timeout(STALL_S) as limit:
                message = await receive()
        except TimeoutError:
            if not limit.expired():
                raise
            raise HTTPException(408, f"no byte of the body came for {STALL_S:g} s; send it anew") from None
        complete = not message.get("more_body", False)
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise _too_large(max_bytes)
        return message

    return counted


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the body is over {max_bytes} bytes; send fewer or smaller files")
