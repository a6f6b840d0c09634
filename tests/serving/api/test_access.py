"""Every route refuses callers without a key, and answers for other owners' jobs as for unknown ones."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
import websockets
from fastapi import FastAPI
from fastapi.routing import APIRoute
from redis.asyncio import Redis
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from websockets.asyncio.client import connect

from serve_app.admission.authenticator import AccountStore
from serve_app.admission.principals import Role, Scope
from serve_app.settings import Settings
from tests.patience import patience
from tests.serving.api.conftest import client_of
from tests.serving.api.fake_model import FakeModel

pytestmark = pytest.mark.parametrize("app", ["locked"], indirect=True)
PUBLIC = {"/health", "/ready", "/openapi.json", "/docs"}
FILLED = {"index": "0", "name": "0.png", "model": "sketch"}
UNKNOWN = "f" * 32
SUBMIT = {"prompt": "a fox", "model": "sketch"}


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def leaves(routes: list[BaseRoute]) -> Iterator[Route | WebSocketRoute]:
    """Every route, those of included routers too."""
    for route in routes:
        if isinstance(route, Route | APIRoute | WebSocketRoute):
            yield route
        elif not isinstance(route, Mount):
            router = getattr(route, "original_router", route)  # FastAPI wraps routers that are included
            yield from leaves(list(router.routes))


def calls(app: FastAPI, task_id: str = UNKNOWN) -> list[tuple[str, str]]:
    """(method, path) of everything that can be called by HTTP, its gaps filled."""
    filled = FILLED | {"task_id": task_id}
    return [
        (method, re.sub(r"{(\w+)(:\w+)?}", lambda gap: filled.get(gap[1], UNKNOWN), path))
        for path, methods in app.openapi()["paths"].items()
        for method in sorted(methods)
    ]


@pytest.fixture
def accounts(redis: Redis, settings: Settings) -> AccountStore:
    return AccountStore.of(redis, settings)


async def key_of(accounts: AccountStore, name: str, *scopes: Scope, role: Role = Role.user) -> str:
    user = await accounts.users.add(name, f"{name}@example.org", role)
    return (await accounts.keys.create(user.id, scopes or {Scope.read, Scope.generate}))[1]


async def test_every_route_that_is_not_public_answers_401_without_a_key(
    app: FastAPI, client: httpx.AsyncClient
):
    documented = {path for _, path in calls(app)}
    routes = [route for route in leaves(app.routes) if not isinstance(route, WebSocketRoute)]
    hidden = [
        (method, route.path)
        for route in routes
        if "{" not in route.path and route.path not in documented
        for method in sorted(route.methods or {"GET"})
    ]

    answers = {(method, path): await client.request(method, path) for method, path in calls(app) + hidden}

    open_paths = {path for (_, path), answer in answers.items() if answer.status_code != 401}
    assert len(answers) > 25
    assert open_paths <= PUBLIC, open_paths - PUBLIC
    assert {"/auth/token", "/auth/session", "/admin/users"} <= {path for _, path in answers}


async def test_a_key_opens_only_what_its_scopes_allow(
    app: FastAPI, client: httpx.AsyncClient, accounts: AccountStore
):
    reader = await key_of(accounts, "reader", Scope.read)
    maker = await key_of(accounts, "maker", Scope.generate)
    gauge = await key_of(accounts, "gauge", Scope.metrics)

    async def status(method: str, path: str, key: str) -> int:
        return (await client.request(method, path, headers=bearer(key), json=SUBMIT)).status_code

    assert await status("GET", "/v1/models", reader) == 200
    assert await status("POST", "/api/generate/image", reader) == 403
    assert await status("POST", "/v1/images/generations", reader) == 403
    assert await status("DELETE", f"/api/generate/{UNKNOWN}", reader) == 403
    assert await status("GET", "/metrics", reader) == 403
    assert await status("POST", "/api/generate/image", maker) == 202
    assert await status("GET", "/api/generate/", maker) == 403
    assert await status("GET", "/metrics", gauge) == 200
    assert await status("GET", "/v1/models", gauge) == 403


async def test_admin_routes_are_for_admins_with_the_scope_alone(
    app: FastAPI, client: httpx.AsyncClient, accounts: AccountStore
):
    plain_user = await key_of(
        accounts, "user", Scope.read, Scope.generate, Scope.admin
    )  # the role does not allow it
    careful = await key_of(accounts, "careful", Scope.read, Scope.generate, role=Role.admin)
    boss = await key_of(accounts, "boss", *Scope, role=Role.admin)
    admin_calls = [call for call in calls(app) if call[1].startswith("/admin/")]

    refused = {
        (await client.request(method, path, headers=bearer(key), json={})).status_code
        for method, path in admin_calls
        for key in (plain_user, careful)
    }
    let_in = {
        (await client.request(method, path, headers=bearer(boss), json={})).status_code
        for method, path in admin_calls
    }

    assert len(admin_calls) >= 6
    assert refused == {403}
    assert not let_in & {401, 403}


async def test_an_admin_makes_users_and_keys_over_http(client: httpx.AsyncClient, accounts: AccountStore):
    boss = bearer(await key_of(accounts, "boss", *Scope, role=Role.admin))
    user = (
        await client.post("/admin/users", json={"name": "Ann", "email": "ann@example.org"}, headers=boss)
    ).json()

    made = (await client.post(f"/admin/users/{user['id']}/keys", json={"name": "x"}, headers=boss)).json()
    me = await client.get("/auth/me", headers=bearer(made["api_key"]))
    off = await client.patch(f"/admin/users/{user['id']}", json={"disabled": True}, headers=boss)
    after = await client.get("/auth/me", headers=bearer(made["api_key"]))
    gone = await client.delete(f"/admin/keys/{made['key']['prefix']}", headers=boss)

    assert me.json()["owner"] == user["id"]
    assert off.json()["disabled"] is True
    assert after.status_code == 401
    assert gone.json()["revoked_at"] is not None
    assert made["api_key"] not in (await client.get("/admin/keys", headers=boss)).text


async def test_jobs_of_other_owners_are_answered_like_unknown_ones(
    app: FastAPI, client: httpx.AsyncClient, accounts: AccountStore, fake_model: FakeModel
):
    ann, bob = await key_of(accounts, "ann"), await key_of(accounts, "bob")
    done = await client.post("/v1/images/generations", json=SUBMIT, headers=bearer(ann))
    assert done.status_code == 200, done.text
    job_id = (await client.get("/api/generate/", headers=bearer(ann))).json()["jobs"][0]["id"]
    by_id = [
        (method, path)
        for method, path in calls(app, job_id)
        if job_id in path and not path.startswith("/api/shared/")  # a link is its own key, below
    ]

    for method, path in by_id:
        theirs = await client.request(method, path, headers=bearer(bob))
        unknown_id = await client.request(method, path.replace(job_id, UNKNOWN), headers=bearer(bob))
        assert theirs.status_code == unknown_id.status_code == 404, f"{method} {path}"
        assert theirs.text.replace(job_id, UNKNOWN) == unknown_id.text, f"{method} {path}"

    assert len(by_id) >= 7
    assert (await client.get("/api/generate/", headers=bearer(bob))).json()["jobs"] == []
    kept = await client.get(f"/api/generate/{job_id}", headers=bearer(ann))
    assert kept.json()["status"] == "completed"  # and Bob's DELETE took nothing away


async def test_a_socket_does_not_show_a_job_of_another_owner(
    app: FastAPI, address: str, accounts: AccountStore
):
    ann, bob = await key_of(accounts, "ann"), await key_of(accounts, "bob")
    async with client_of(app) as client:
        answer = await client.post("/api/generate/image", json=SUBMIT, headers=bearer(ann))
        cookie = await client.post("/auth/session", json={"api_key": ann})
    job_id, session = answer.json()["id"], cookie.cookies["weft_session"]

    async def refusal(path_id: str, headers: dict[str, str]) -> int:
        with pytest.raises(websockets.InvalidStatus) as refused:
            await connect(f"ws://{address}/ws/{path_id}", additional_headers=headers, open_timeout=patience())
        return refused.value.response.status_code

    assert await refusal(job_id, bearer(bob)) == 404
    assert await refusal(UNKNOWN, bearer(bob)) == 404
    assert await refusal(job_id, {}) == 401
    by_cookie = {"Cookie": f"weft_session={session}"}
    assert await refusal(job_id, by_cookie | {"Origin": "https://evil.example"}) == 403
    assert await refusal(job_id, by_cookie) == 403  # browsers always send a socket's origin
    async with connect(
        f"ws://{address}/ws/{job_id}", additional_headers=by_cookie | {"Origin": f"http://{address}"}
    ) as socket:
        assert '"queued"' in str(await socket.recv())


async def test_an_exhausted_quota_is_refused_with_the_time_until_the_next_day(
    client: httpx.AsyncClient, accounts: AccountStore
):
    user = await accounts.users.add("Ann", "ann@example.org", images_per_day=2)
    key = bearer((await accounts.keys.create(user.id, {Scope.read, Scope.generate}))[1])

    answers = [await client.post("/api/generate/image", json=SUBMIT, headers=key) for _ in range(3)]
    openai = await client.post("/v1/images/generations", json=SUBMIT, headers=key)
    cancelled = await client.delete(f"/api/generate/{answers[0].json()['id']}", headers=key)
    again = await client.post("/api/generate/image", json=SUBMIT, headers=key)

    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert answers[2].json()["error"]["kind"] == "quota_exceeded"
    assert 0 < int(answers[2].headers["retry-after"]) <= 86_400
    assert (openai.status_code, openai.headers["x-should-retry"]) == (429, "false")
    assert cancelled.json()["status"] == "cancelled"
    assert again.status_code == 202


async def test_too_many_submits_of_one_user_are_limited_while_others_continue(
    app: FastAPI, client: httpx.AsyncClient, accounts: AccountStore, settings: Settings, redis: Redis
):
    ann, bob = await key_of(accounts, "ann"), await key_of(accounts, "bob")
    me = (await client.get("/auth/me", headers=bearer(ann))).json()["owner"]
    await redis.set(f"{settings.redis_prefix}rate:submit:{me}", settings.submits_per_minute, ex=60)

    refused = [
        await client.post("/api/generate/image", json=SUBMIT, headers=bearer(ann) | forwarded)
        for forwarded in ({}, {"X-Forwarded-For": "6.6.6.6"})
    ]
    other = await client.post("/api/generate/image", json=SUBMIT, headers=bearer(bob))
    reads = await client.get("/api/generate/", headers=bearer(ann))

    assert [answer.status_code for answer in refused] == [429, 429]
    assert 0 < int(refused[0].headers["retry-after"]) <= 60
    assert 0 < int(refused[0].headers["retry-after-ms"]) <= 60_000
    assert (other.status_code, reads.status_code) == (202, 200)


async def test_a_service_full_of_calls_answers_with_retry_after(
    client: httpx.AsyncClient, accounts: AccountStore, settings: Settings, redis: Redis
):
    ann = await key_of(accounts, "ann")
    others = {f"call{n}": 9e12 for n in range(settings.max_concurrent_calls)}
    await redis.zadd(f"{settings.redis_prefix}calls", others)

    refused = await client.post("/api/generate/image", json=SUBMIT, headers=bearer(ann))
    await redis.zrem(f"{settings.redis_prefix}calls", "call0")
    let_in = await client.post("/api/generate/image", json=SUBMIT, headers=bearer(ann))

    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    assert let_in.status_code == 202
    assert await redis.zcard(f"{settings.redis_prefix}calls") == settings.max_concurrent_calls - 1


async def test_a_link_opens_its_one_file_without_a_key_until_its_time_is_up(
    client: httpx.AsyncClient, accounts: AccountStore, fake_model: FakeModel
):
    ann, bob = bearer(await key_of(accounts, "ann")), bearer(await key_of(accounts, "bob"))
    await client.post("/v1/images/generations", json=SUBMIT, headers=ann)
    job_id = (await client.get("/api/generate/", headers=ann)).json()["jobs"][0]["id"]
    whole = await client.get(f"/api/results/{job_id}/0.png", headers=ann)

    given = (await client.get(f"/api/results/{job_id}/0/link", params={"for_s": 60}, headers=ann)).json()
    link = httpx.URL(given["url"])
    opened = await client.get(link)
    part = await client.get(link, headers={"Range": "bytes=0-7"})
    others = [
        link.copy_set_param("expires", int(link.params["expires"]) + 1),
        link.copy_set_param("signature", "x" * 43),
        link.copy_set_param("signature", ""),
        link.copy_with(path=link.path.replace("/image", "/thumbnail")),
        link.copy_with(path=link.path.replace("/0/", "/1/")),
        link.copy_with(path=link.path.replace(job_id, UNKNOWN)),
    ]
    refused = [(await client.get(other)).status_code for other in others]
    refused_bob = await client.get(f"/api/results/{job_id}/0/link", headers=bob)
    await client.delete(f"/api/generate/{job_id}", headers=ann)
    after = await client.get(link)

    assert (opened.status_code, opened.content) == (200, whole.content)
    assert opened.headers["content-type"] == "image/png"
    assert opened.headers["cross-origin-resource-policy"] == "cross-origin"
    assert 0 < int(opened.headers["cache-control"].rpartition("=")[2]) <= 60
    assert (part.status_code, part.content) == (206, whole.content[:8])
    assert refused == [401] * 6
    assert refused_bob.status_code == 404
    assert after.status_code == 404


async def test_a_ticket_opens_one_socket_once_and_nothing_else(
    app: FastAPI, address: str, accounts: AccountStore, redis: Redis, settings: Settings
):
    ann, bob = bearer(await key_of(accounts, "ann")), bearer(await key_of(accounts, "bob"))
    maker = bearer(await key_of(accounts, "maker", Scope.generate))
    async with client_of(app) as client:
        job_id = (await client.post("/api/generate/image", json=SUBMIT, headers=ann)).json()["id"]
        given = (await client.post("/auth/ticket", headers=ann)).json()
        hers, wasted, his = [
            (await client.post("/auth/ticket", headers=key)).json()["ticket"] for key in (ann, ann, bob)
        ]
        as_a_key = await client.get("/auth/me", headers=bearer(hers))
        blind = await client.post("/auth/ticket", headers=maker)
    kept = [key async for key in redis.scan_iter(f"{settings.redis_prefix}ticket:*")]
    lives = {await redis.ttl(key) for key in kept}

    async def refusal(ticket: str) -> int:
        with pytest.raises(websockets.InvalidStatus) as refused:
            await connect(f"ws://{address}/ws/{job_id}?ticket={ticket}", open_timeout=patience())
        return refused.value.response.status_code

    async with connect(f"ws://{address}/ws/{job_id}?ticket={hers}") as socket:
        assert '"queued"' in str(await socket.recv())
    assert await refusal(hers) == 401
    assert await refusal(his) == 404  # he is who he is
    assert await refusal("x" * 43) == await refusal("not-one") == await refusal("") == 401
    await accounts.users.set_disabled((await accounts.users.find("ann@example.org")).id, True)
    assert await refusal(wasted) == 401

    assert given["expires_in"] == 30
    assert (as_a_key.status_code, blind.status_code) == (401, 403)
    assert len(kept) == 4
    assert max(lives) <= 30
    assert not [key for key in kept if hers in key]
