"""The app: every dialect's router behind one shell, and the page."""

from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from serve_app.api import (
    admin,
    auth,
    docs,
    errors,
    events,
    gallery,
    links,
    loras,
    models,
    native,
    openai,
    ops,
    tasks,
    videos,
)
from serve_app.api.guards import (
    BodyLimitMiddleware,
    HeaderLimitMiddleware,
    LocalOnlyMiddleware,
    ResponseEnvelopeMiddleware,
)
from serve_app.api.schemas.error import ErrorResponse, OpenAIErrorBody
from serve_app.api.state import ApiState, get_caller

GZIP_FROM_BYTES = 1024
OPENAI_ERROR = {"$ref": "#/components/schemas/OpenAIRefusal"}
FORM_BYTES = 2**20  # of an upload, around its file
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "Refused: `message` names the cause and the cure."},
    "5XX": {"model": ErrorResponse, "description": "Not now: see Retry-After."},
}

page = APIRouter(include_in_schema=False)


def create_app(state: ApiState) -> FastAPI:
    """The HTTP face over these doors. It starts nothing and owns nothing: who made them closes them."""
    settings = state.settings
    app = WeftApi(
        title="Weft",
        summary="Serves diffusion models on Ray.",
        redirect_slashes=False,  # a redirect names the Host it was called by, which a proxy may have changed
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(ResponseEnvelopeMiddleware, metrics=state.metrics, max_call_s=settings.max_call_s),
            Middleware(HeaderLimitMiddleware),
            Middleware(LocalOnlyMiddleware, settings=settings),
            Middleware(GZipMiddleware, minimum_size=GZIP_FROM_BYTES, compresslevel=5),
            Middleware(
                BodyLimitMiddleware,
                max_bytes=settings.max_body_bytes,
                max_depth=settings.max_json_depth,
                max_upload_bytes=settings.max_adapter_bytes + FORM_BYTES,
            ),
        ],
    )
    app.state.weft = state
    errors.install(app)
    app.include_router(ops.public)
    app.include_router(docs.public)
    app.include_router(auth.public, responses=ERROR_RESPONSES)
    app.include_router(links.public, responses=ERROR_RESPONSES)
    app.include_router(events.sockets)
    for router in (native, events, links, gallery, loras, models, tasks, videos, openai, ops, auth, admin):
        # denied by default: a route behind this needs a known caller even if it forgets to ask
        app.include_router(router.router, dependencies=[Depends(get_caller)], responses=ERROR_RESPONSES)
    if settings.ui:
        app.include_router(page)
        app.mount("/ui", PageFiles(directory=str(files("serve_app") / "web"), html=True), name="ui")
    return app


class WeftApi(FastAPI):
    """Describes the refusals of OpenAI's dialect in OpenAI's words, as errors.py renders them by path."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            shapes = schema["components"]["schemas"]
            shapes["OpenAIRefusal"] = OpenAIErrorBody.model_json_schema()
            for path, operations in schema["paths"].items():
                for operation in operations.values() if path.startswith("/v1/") else ():
                    for code in ERROR_RESPONSES:
                        shape = {
                            "type": "object",
                            "required": ["error"],
                            "properties": {"error": OPENAI_ERROR},
                        }
                        operation["responses"][code]["content"] = {"application/json": {"schema": shape}}
        return super().openapi()


class PageFiles(StaticFiles):
    """The page's files; browsers ask again each time and mostly hear 304."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


@page.get("/")
@page.get("/ui")
async def to_page(http_request: Request) -> RedirectResponse:
    """The page lies under /ui/."""
    return RedirectResponse(f"{http_request.scope.get('root_path', '').rstrip('/')}/ui/", 307)
