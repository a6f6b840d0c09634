"""The HTTP app: middleware, every dialect's routers, and the page."""

from fastapi import APIRouter, Depends, FastAPI

from serve_app.api import (
    a1111,
    admin,
    docs,
    events,
    exception_handlers,
    jobs,
    links,
    loras,
    mcp,
    models,
    native,
    openai,
    ops,
    page,
    replicate,
    results,
    sessions,
    tasks,
    usage,
    websocket,
)
from serve_app.api.auth import get_caller
from serve_app.api.middleware.stack import middleware_stack
from serve_app.api.openapi import ERROR_RESPONSES, WeftApi
from serve_app.api.query import check_parameters
from serve_app.api.state import ApiState

ROUTERS: tuple[APIRouter, ...] = (
    *native.ROUTERS,
    jobs.router,
    events.router,
    links.router,
    results.router,
    loras.router,
    models.router,
    *tasks.ROUTERS,
    *replicate.ROUTERS,  # before the models of OpenAI, whose ids may have slashes
    *openai.ROUTERS,
    *a1111.ROUTERS,
    *mcp.ROUTERS,
    ops.router,
    usage.router,
    sessions.router,
    admin.router,
)


def create_app(state: ApiState) -> FastAPI:
    """The app over these services. It starts and closes none of them."""
    app = WeftApi(
        title="Weft",
        summary="Serves diffusion models on Ray.",
        redirect_slashes=False,  # a redirect names the Host it was called by, which a proxy may have changed
        docs_url=None,
        redoc_url=None,
        middleware=middleware_stack(state),
    )
    app.state.weft = state
    exception_handlers.install(app)
    app.include_router(ops.public)
    app.include_router(docs.public)
    checked = Depends(check_parameters)
    app.include_router(sessions.public, dependencies=[checked], responses=ERROR_RESPONSES)
    app.include_router(links.public, dependencies=[checked], responses=ERROR_RESPONSES)
    app.include_router(websocket.router, dependencies=[checked])
    for router in ROUTERS:
        # denied by default: a route of these routers needs a known caller even if it forgets to ask
        app.include_router(router, dependencies=[Depends(get_caller), checked], responses=ERROR_RESPONSES)
    if state.settings.ui:
        app.include_router(page.router)
        app.mount("/ui", page.PageFiles(), name="ui")
    return app
