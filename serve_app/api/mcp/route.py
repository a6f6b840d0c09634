"""POST /mcp: streamable HTTP without sessions, so that any replica of the ingress answers any call."""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache
from typing import Any

import mcp_types as types
from fastapi import APIRouter
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel.server import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments import __version__
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext
from serve_app.api.mcp.tools import call, tools

router = APIRouter(tags=["mcp"])
_CALLER: ContextVar[CallerContext] = ContextVar("caller")  # of the call that a tool runs in
Context = ServerRequestContext[Any, Any]


class _McpResponse(Response):
    """Answers one call by the protocol: a JSON-RPC answer, or a stream with progress before it."""

    def __init__(self, caller: CallerContext) -> None:
        super().__init__()
        self._caller = caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = _CALLER.set(self._caller)
        limit = self._caller.state.settings.max_body_bytes
        manager = StreamableHTTPSessionManager(_server(), stateless=True, max_request_body_size=limit)
        try:
            async with manager.run():  # of this call alone
                await manager.handle_request(scope, receive, send)
        finally:
            _CALLER.reset(token)


@router.post("/mcp", response_class=Response)
async def speak_mcp(caller: CurrentCaller) -> Response:
    """The Model Context Protocol: generate_image, edit_image, generate_video, list_models, job_status."""
    return _McpResponse(caller)


@cache
def _server() -> Server[Any]:
    return Server(
        "weft",
        version=__version__,
        instructions="Generates and edits images and videos. list_models says what there is.",
        on_list_tools=_list_tools,
        on_call_tool=_call_tool,
    )


async def _list_tools(_context: Context, _page: types.PaginatedRequestParams | None) -> types.ListToolsResult:
    return types.ListToolsResult(tools=tools())


async def _call_tool(context: Context, params: types.CallToolRequestParams) -> types.CallToolResult:
    async def report(done: float) -> None:
        await context.session.report_progress(done, 100.0)

    return await call(_CALLER.get(), params.name, params.arguments or {}, report)
