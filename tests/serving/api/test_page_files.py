"""The page's files at addresses with their version: kept for good, and never of another version."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import httpx
import pytest
from starlette.exceptions import HTTPException

from serve_app.api.page import PageFiles, PageVersion

WEB = Path(__file__).parents[3] / "serve_app" / "web"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(WEB, tmp_path / "web"))


def _client(folder: Path) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(PageFiles(folder)), base_url="http://page")


async def test_every_file_the_document_names_is_kept_for_good(folder: Path):
    async with _client(folder) as client:
        document = await client.get("/")
        named = set(re.findall(r'(?:src|href)="(v-[^"]+)"', document.text))
        answers = [await client.get(f"/{name}") for name in named]

    assert document.headers["cache-control"] == "no-cache"
    assert {f"v-{PageVersion(folder).current}"} == {name.split("/")[0] for name in named}
    assert "js/app.js" in {name.split("/", 1)[1] for name in named}
    assert {(answer.status_code, answer.headers["cache-control"]) for answer in answers} == {
        (200, "public, max-age=31536000, immutable")
    }


async def test_a_document_that_is_known_is_answered_with_304(folder: Path):
    async with _client(folder) as client:
        etag = (await client.get("/")).headers["etag"]
        known = await client.get("/", headers={"if-none-match": etag})
        (folder / "js" / "app.js").write_text("// changed", encoding="utf-8")
        changed = await client.get("/", headers={"if-none-match": etag})

    assert (known.status_code, known.text, changed.status_code) == (304, "", 200)
    assert changed.headers["etag"] != etag


@pytest.mark.parametrize("address", ["/js/app.js", "/v-0123456789abcdef/js/app.js"])
async def test_a_file_of_no_or_another_version_is_asked_for_anew(folder: Path, address: str):
    async with _client(folder) as client:
        answer = await client.get(address)

    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-cache")


async def test_a_versioned_address_does_not_leave_the_folder(folder: Path):
    (folder.parent / "secret.txt").write_text("secret", encoding="utf-8")
    path = f"/v-{PageVersion(folder).current}/%2e%2e/%2e%2e/secret.txt"

    async with _client(folder) as client:
        with pytest.raises(HTTPException, match="404"):  # which the application answers
            await client.get(path)


def test_the_version_depends_on_names_and_contents_only(folder: Path, tmp_path: Path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile))
    assert PageVersion(copy).current == PageVersion(folder).current

    (copy / "js" / "app.js").rename(copy / "js" / "start.js")

    assert PageVersion(copy).current != PageVersion(folder).current
