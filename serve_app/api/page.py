"""The web page: static files under /ui/."""

from importlib.resources import files

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

router = APIRouter(include_in_schema=False)


class PageFiles(StaticFiles):
    """The page's files; browsers revalidate them on every load and mostly get 304."""

    def __init__(self) -> None:
        super().__init__(directory=str(files("serve_app") / "web"), html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


@router.get("/")
@router.get("/ui")
async def to_page(http_request: Request) -> RedirectResponse:
    """Redirects to /ui/."""
    return RedirectResponse(f"{http_request.scope.get('root_path', '').rstrip('/')}/ui/", 307)
