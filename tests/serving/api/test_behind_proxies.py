"""Behind a proxy: callers are distinguished by what a trusted one reports, and cannot lock each other out."""

from __future__ import annotations

import logging
import secrets
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from redis.asyncio import Redis

from serve_app.admission.authenticator import AccountStore
from serve_app.api.app import create_app
from serve_app.api.state import ApiState
from serve_app.settings import Settings
from tests.patience import patience
from tests.serving.api.conftest import JWT_SECRET, KEY
from tests.serving.api.fake_model import FakeModel
from tests.serving.api.test_access import SUBMIT, bearer, key_of

PROXY = "10.1.2.3"
LOCKED = {"api_key": SecretStr(KEY), "jwt_secret": SecretStr(JWT_SECRET)}


@pytest.fixture
def accounts(redis: Redis, settings: Settings) -> AccountStore:
    return AccountStore.of(redis, settings)


def app_of(state: ApiState, **changes: object) -> FastAPI:
    return create_app(replace(state, settings=state.settings.model_copy(update=changes)))


def through(app: FastAPI, peer: str = PROXY, **headers: str) -> httpx.AsyncClient:
    """Calls as they come from this peer. headers: with _ for -."""
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, client=(peer, 4711)),
        base_url="http://127.0.0.1",
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        timeout=patience(),
    )


def made_up_key() -> str:
    return f"wf_{secrets.token_hex(6)}.{secrets.token_urlsafe(32)}"


@pytest.mark.parametrize("path", ["/auth/token", "/auth/session"])
async def test_wrong_keys_of_a_stranger_lock_no_one_else_behind_the_same_proxy(
    state: ApiState, accounts: AccountStore, path: str
) -> None:
    ann = await key_of(accounts, "ann")
    async with through(app_of(state, **LOCKED)) as client:
        by_stranger = [
            (await client.post(path, json={"api_key": key})).status_code
            for key in [made_up_key() for _ in range(110)] + ["wrong"] * 12
        ]

        by_ann = await client.post(path, json={"api_key": ann})
        by_operator = await client.post(path, json={"api_key": KEY})
        client.cookies.clear()
        reads = await client.get("/auth/me", headers=bearer(ann))

    assert by_stranger[:100] == [401] * 100
    assert set(by_stranger[100:]) == {429}
    assert [by_ann.status_code, by_operator.status_code, reads.status_code] == [200] * 3


async def test_wrong_keys_of_one_prefix_are_counted_and_the_right_one_still_opens(
    state: ApiState, accounts: AccountStore
) -> None:
    ann = await key_of(accounts, "ann")
    wrong = f"{ann.partition('.')[0]}.{'x' * 43}"
    async with through(app_of(state, **LOCKED)) as client:
        tries = [(await client.post("/auth/token", json={"api_key": wrong})).status_code for _ in range(12)]
        right = await client.post("/auth/token", json={"api_key": ann})

    assert tries == [401] * 10 + [429] * 2
    assert right.status_code == 200


async def test_a_wrong_key_is_logged_with_its_callers_address_and_without_its_secret(
    state: ApiState, caplog: pytest.LogCaptureFixture
) -> None:
    key = made_up_key()
    with caplog.at_level(logging.INFO, "serve_app"):
        async with through(app_of(state, **LOCKED, trusted_proxies=("10.0.0.0/8",))) as client:
            await client.get("/auth/me", headers=bearer(key) | {"X-Forwarded-For": "203.0.113.9"})

    line = next(record for record in caplog.records if record.getMessage() == "a wrong key was sent")
    assert (line.__dict__["client"], line.__dict__["key"]) == ("203.0.113.9", key[3:15])
    assert key[16:] not in str([record.__dict__ for record in caplog.records])


async def test_callers_behind_a_trusted_proxy_are_counted_apart(state: ApiState) -> None:
    app = app_of(state, **LOCKED, trusted_proxies=("10.0.0.0/8",))
    async with through(app) as client:

        async def tries(name: str, value: str) -> list[int]:
            headers = bearer("wrong") | {name: value}
            return [(await client.get("/auth/me", headers=headers)).status_code for _ in range(11)]

        first = await tries("X-Forwarded-For", "6.6.6.6, 203.0.113.9")
        same = await tries("Forwarded", "for=203.0.113.9")
        other = await tries("X-Forwarded-For", "203.0.113.10")

    assert first == [401] * 10 + [429]
    assert same == [429] * 11
    assert other == [401] * 10 + [429]


async def test_an_untrusted_peer_is_counted_by_its_own_address_whatever_it_claims(state: ApiState) -> None:
    app = app_of(state, **LOCKED, trusted_proxies=("10.0.0.0/8",))
    async with through(app, peer="203.0.113.1") as client:
        tries = [
            (
                await client.get("/auth/me", headers=bearer("wrong") | {"X-Forwarded-For": f"6.6.6.{n}"})
            ).status_code
            for n in range(11)
        ]

    assert tries == [401] * 10 + [429]


async def test_links_and_the_cookie_follow_what_the_proxy_was_called_by(
    state: ApiState, fake_model: FakeModel
) -> None:
    app = app_of(state, **LOCKED, trusted_proxies=("10.0.0.0/8",))
    reported = {
        "X_Forwarded_Proto": "https",
        "X_Forwarded_Host": "weft.example",
        "X_Forwarded_For": "6.6.6.6",
    }
    links, cookies = [], []
    for peer in (PROXY, "203.0.113.1"):
        async with through(app, peer, **reported) as client:
            await client.post("/v1/images/generations", json=SUBMIT, headers=bearer(KEY))
            job_id = (await client.get("/api/generate/", headers=bearer(KEY))).json()["jobs"][0]["id"]
            link = await client.get(f"/api/results/{job_id}/0/link", headers=bearer(KEY))
            links.append(link.json()["url"].partition("/api/")[0])
            cookies.append((await client.post("/auth/session", json={"api_key": KEY})).headers["set-cookie"])

    assert links == ["https://weft.example", "http://127.0.0.1"]
    assert ["secure" in cookie.lower() for cookie in cookies] == [True, False]


async def test_the_page_behind_a_proxy_is_no_other_site(state: ApiState) -> None:
    app = app_of(state, **LOCKED, trusted_proxies=("10.0.0.0/8",))
    async with through(app, X_Forwarded_Host="weft.example", X_Forwarded_Proto="https") as client:
        cookie = (await client.post("/auth/session", json={"api_key": KEY})).cookies["weft_session"]
        headers = {"Cookie": f"weft_session={cookie}", "X-Weft-CSRF": "1"}
        own = await client.post("/auth/ticket", headers=headers | {"Origin": "https://weft.example"})
        other = await client.post("/auth/ticket", headers=headers | {"Origin": "https://evil.example"})

    assert (own.status_code, other.status_code) == (200, 403)


async def test_without_a_key_a_caller_from_elsewhere_is_refused_behind_a_local_proxy_too(
    state: ApiState,
) -> None:
    app = app_of(state, trusted_proxies=("127.0.0.1",))
    async with through(app, "127.0.0.1") as client:
        here = await client.get("/api/models/")
        elsewhere = await client.get("/api/models/", headers={"X-Forwarded-For": "203.0.113.9"})
        rebound = await client.get(
            "/api/models/", headers={"Host": "evil.example", "X-Forwarded-Host": "localhost"}
        )

    assert [answer.status_code for answer in (here, elsewhere, rebound)] == [200, 403, 403]


@pytest.mark.parametrize("host", ["[", "[::1", "a b", "", "x" * 300, "weft.example:99999", "é"])
@pytest.mark.parametrize("forwarded", ["weft.example", ""])
async def test_a_host_that_is_none_breaks_no_call(state: ApiState, host: str, forwarded: str) -> None:
    headers = {"Host": host.encode("latin-1"), "X-Forwarded-Host": forwarded.encode()}
    async with through(app_of(state, **LOCKED, trusted_proxies=("10.0.0.0/8",))) as client:
        logged_in = await client.post("/auth/session", json={"api_key": KEY}, headers=headers)
        client.cookies.clear()
        reads = await client.get("/api/models/", headers=headers | bearer(KEY))
        page = await client.get("/openapi.json", headers=headers)

    assert [answer.status_code for answer in (logged_in, reads, page)] == [200] * 3
