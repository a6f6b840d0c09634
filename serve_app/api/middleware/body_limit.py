"""A limit on the size of request bodies, counted as they arrive, and on the shape of their JSON."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.protocol.errors import BadRequest, TooLarge
from serve_app.api.errors import render, route_path
from serve_app.api.middleware.json_shape import check_json_shape

UPLOADS_PATH = "/api/loras"  # takes a form with a file


class ClientGone(Exception):
    """The client disconnected before its body was complete."""


class BodyLimitMiddleware:
    """Reads a body up to the limit and checks its JSON before any route sees it.

    The upload of a LoRA has a limit of its own, and is read by the route once its caller is known.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_depth: int, max_upload_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_depth = max_depth
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        content_type = Headers(scope=scope).get("content-type", "")
        if route_path(scope) == UPLOADS_PATH and content_type.lower().startswith("multipart/"):
            await self.app(scope, _counted(receive, self.max_upload_bytes), send)
            return
        try:
            body = await self._read(scope, receive)
            if "json" in content_type.lower():
                check_json_shape(body, self.max_depth)
        except TooLarge as error:
            await render(error, scope)(scope, receive, send)
        except BadRequest as error:
            await render(error, scope, status=400)(scope, receive, send)
        except ClientGone:
            return
        else:
            await self.app(scope, _replayed(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises TooLarge, ClientGone."""
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and (len(declared) > 15 or int(declared) > self.max_bytes):
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is over {self.max_bytes} bytes; send fewer or smaller pictures")


def _counted(receive: Receive, max_bytes: int) -> Receive:
    """A receive that raises TooLarge, in the route that reads the body, after max_bytes."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise TooLarge(f"the upload is over {max_bytes} bytes")
        return message

    return counted


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the whole body once, then what the server sends next (a disconnect)."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
