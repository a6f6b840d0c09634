"""Pages of the web sites that the operator allows may call the API with a key; no others."""

from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
from pydantic import SecretStr

from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.settings import Settings
from tests.serving.api.conftest import KEY, client_of
from tests.serving.api.fake_model import FakeModel

ALLOWED, OTHER = "https://chat.example.org", "https://evil.example.org"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.fixture(params=[True, False], ids=["with a key", "open"])
async def client(
    state: ApiState, fake_model: FakeModel, request: pytest.FixtureRequest
) -> AsyncIterator[httpx.AsyncClient]:
    changes: dict[str, object] = {"cors_origins": (ALLOWED,)}
    if request.param:
        changes["api_key"] = SecretStr(KEY)
    settings = state.settings.model_copy(update=changes)
    async with client_of(create_app(replace(state, settings=settings))) as client:
        yield client


async def test_a_preflight_of_an_allowed_site_is_answered_without_a_key(client: httpx.AsyncClient) -> None:
    answer = await client.options("/v1/images/generations", headers={**PREFLIGHT, "Origin": ALLOWED})

    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ALLOWED
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in answer.headers


async def test_an_allowed_site_reads_answers_and_errors(client: httpx.AsyncClient) -> None:
    headers = {"Origin": ALLOWED, "Authorization": f"Bearer {KEY}", "Sec-Fetch-Site": "cross-site"}

    good = await client.post("/v1/images/generations", json={"prompt": "a star"}, headers=headers)
    bad = await client.post("/v1/images/generations", json={"prompt": 3}, headers=headers)

    assert (good.status_code, bad.status_code) == (200, 400)
    for answer in (good, bad):
        assert answer.headers["access-control-allow-origin"] == ALLOWED
        exposed = answer.headers["access-control-expose-headers"]
        assert {"X-Request-ID", "Retry-After", "Location"} <= set(exposed.split(", "))


async def test_a_wrong_key_is_readable_for_an_allowed_site(
    client: httpx.AsyncClient, state: ApiState
) -> None:
    answer = await client.get("/v1/models", headers={"Origin": ALLOWED, "Authorization": "Bearer wrong"})

    assert answer.headers["access-control-allow-origin"] == ALLOWED


async def test_other_sites_are_allowed_nothing(client: httpx.AsyncClient) -> None:
    preflight = await client.options("/v1/models", headers={**PREFLIGHT, "Origin": OTHER})
    call = await client.get("/v1/models", headers={"Origin": OTHER, "Authorization": f"Bearer {KEY}"})

    assert preflight.status_code == 400
    assert "access-control-allow-origin" not in preflight.headers
    assert "access-control-allow-origin" not in call.headers


async def test_without_the_setting_no_site_is_allowed(state: ApiState) -> None:
    async with client_of(create_app(state)) as client:
        answer = await client.options("/v1/models", headers={**PREFLIGHT, "Origin": ALLOWED})

    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(("key", "status"), [(SecretStr(KEY), 200), (None, 403)])
async def test_a_star_allows_every_site_only_with_a_key(
    state: ApiState, key: SecretStr | None, status: int
) -> None:
    settings = state.settings.model_copy(update={"cors_origins": ("*",), "api_key": key})
    async with client_of(create_app(replace(state, settings=settings))) as client:
        answer = await client.get("/v1/models", headers={"Origin": OTHER, "Authorization": f"Bearer {KEY}"})

    assert answer.status_code == status


@pytest.mark.parametrize(
    "text", ["chat.example.org", "https://chat.example.org/app", "ftp://chat.example.org"]
)
def test_what_is_no_web_site_is_refused_with_the_form(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CORS_ORIGINS", text)

    with pytest.raises(Exception, match=r"WEFT_CORS_ORIGINS .* scheme and host and port only"):
        Settings.load()


def test_sites_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CORS_ORIGINS", "https://a.example.org, http://localhost:3000/ http://[::1]:80")

    assert Settings.load().cors_origins == (
        "https://a.example.org",
        "http://localhost:3000",
        "http://[::1]:80",
    )
