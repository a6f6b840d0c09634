"""HEAD wherever GET is: the same status and headers, without the body."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadMiddleware:
    """Runs the route of GET for a HEAD, and sends the head of its answer only."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        inner = {**scope, "method": "GET"}
        begun = False

        async def send_head(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                await send(message)
                await send({"type": "http.response.body", "body": b""})
            elif message.get("more_body", False):
                raise _HeadSent  # a stream would go on for as long as its job runs

        try:
            await self.app(inner, receive, send_head)
        except* _HeadSent:
            assert begun, "a body follows its head"
        finally:
            if "route" in inner:  # for the metrics
                scope["route"] = inner["route"]


class _HeadSent(Exception):
    """Ends the route: what it would send now is the body."""
