"""A time limit until an answer begins, which no header of a client changes."""

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.protocol.errors import Overloaded
from serve_app.api.errors import render

logger = logging.getLogger(__name__)


class TimeLimitMiddleware:
    """Answers 504 to a call whose answer has not begun within max_call_s; streams may last longer."""

    def __init__(self, app: ASGIApp, max_call_s: float) -> None:
        self.app = app
        self.max_call_s = max_call_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = asyncio.timeout(self.max_call_s)

        async def send_and_stop_clock(message: Message) -> None:
            if message["type"] == "http.response.start":
                limit.reschedule(None)
            await send(message)

        try:
            async with limit:
                await self.app(scope, receive, send_and_stop_clock)
        except TimeoutError:
            if not limit.expired():
                raise
            logger.error("request timed out", extra={"max_call_s": self.max_call_s})
            error = Overloaded(f"no answer within {self.max_call_s:g} s; submit a job and ask for its state")
            await render(error, scope, status=504)(scope, receive, send)
