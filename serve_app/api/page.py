"""The web page: static files under /ui/, cached for good at addresses that name their content."""

import hashlib
import re
from functools import lru_cache
from importlib.resources import files
from os import PathLike, stat_result
from pathlib import Path

from fastapi import APIRouter
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Scope

router = APIRouter(include_in_schema=False)

DOCUMENT = "index.html"
IMMUTABLE = "public, max-age=31536000, immutable"
REVALIDATED = "no-cache"  # asked for anew on every load, and mostly answered with 304


class PageVersion:
    """The version of a folder of page files, and the document that names it.

    The document asks for `v-<version>/js/app.js` and so on. Relative imports of modules stay below that
    address, so that one version of the page never mixes with another, also while replicas are replaced.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.current = ""
        self.document()

    def document(self) -> str:
        """The text of index.html with addresses of the current version. Files may have changed meanwhile."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        self.current = _digest(self.folder, tuple((path, path.stat().st_mtime_ns) for path in paths))
        text = (self.folder / DOCUMENT).read_text(encoding="utf-8")
        return re.sub(r'((?:src|href)=")((?:js|css|icons|locales)/)', rf"\1v-{self.current}/\2", text)

    def split(self, path: str) -> tuple[str, str]:
        """A path below /ui/ without its version, and the Cache-Control of the answer.

        Another version than the current one is answered with the current file, which no cache keeps.
        """
        version, _, name = path.replace("\\", "/").partition("/")
        if not name or not version.startswith("v-"):
            return path, REVALIDATED
        return name, IMMUTABLE if version == f"v-{self.current}" else REVALIDATED


@lru_cache(maxsize=2)
def _digest(folder: Path, stated: tuple[tuple[Path, int], ...]) -> str:
    """Of the files' names and contents; the same on every replica, whatever the times of its files."""
    digest = hashlib.sha256()
    for path, _ in stated:
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


class PageFiles(StaticFiles):
    """The page's files, of one version for each document."""

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or Path(str(files("serve_app") / "web"))
        super().__init__(directory=folder, html=True)
        self.version = PageVersion(folder)

    async def get_response(self, path: str, scope: Scope) -> Response:
        name, caching = self.version.split(path)
        response = await super().get_response(name, scope)
        response.headers["Cache-Control"] = caching
        return response

    def file_response(
        self,
        full_path: str | PathLike[str],
        stat_result: stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        if Path(full_path).name != DOCUMENT:
            return super().file_response(full_path, stat_result, scope, status_code)
        response = HTMLResponse(self.version.document(), status_code)
        response.headers["ETag"] = f'"{self.version.current}"'
        if self.is_not_modified(response.headers, Headers(scope=scope)):
            return NotModifiedResponse(response.headers)
        return response


@router.get("/")
@router.get("/ui")
async def to_page(http_request: Request) -> RedirectResponse:
    """Redirects to /ui/."""
    return RedirectResponse(f"{http_request.scope.get('root_path', '').rstrip('/')}/ui/", 307)
