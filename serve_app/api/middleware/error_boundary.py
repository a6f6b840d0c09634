"""The last catch for exceptions that no handler expected."""

import logging

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.protocol.errors import Internal, WeftError
from serve_app.api.middleware.send_error import send_error

logger = logging.getLogger(__name__)

ANSWER_STARTS = (
    "http.response.start",
    "websocket.http.response.start",
    "websocket.accept",
    "websocket.close",
)


class ErrorBoundaryMiddleware:
    """Logs an exception with its traceback and answers 500, naming the request id and nothing else."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = False

        async def send_and_note(message: Message) -> None:
            nonlocal answering
            answering = answering or message["type"] in ANSWER_STARTS
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except ClientDisconnect:
            return  # before its body was complete: there is no one to answer
        except Exception as error:
            if scope["type"] not in ("http", "websocket"):
                raise
            logger.exception("request failed")
            if answering:
                raise  # half an answer is out: the server breaks the connection, which the client can see
            await send_error(_as_weft_error(error, scope["state"]["request_id"]), scope, receive, send)


def _as_weft_error(error: Exception, request_id: str) -> WeftError:
    if isinstance(error, WeftError):
        return error
    return Internal(f"something broke here, and it is logged as {request_id}; try again, then report it")
