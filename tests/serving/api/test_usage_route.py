"""GET /api/usage: callers see their own, admins everyone's; and every job says what it used."""

from __future__ import annotations

import csv
import io

import httpx
import pytest
from redis.asyncio import Redis

from serve_app.admission.authenticator import AccountStore
from serve_app.admission.principals import Role, Scope
from serve_app.settings import Settings
from tests.serving.api.conftest import KEY
from tests.serving.api.fake_model import FakeModel
from tests.serving.api.test_access import bearer

pytestmark = pytest.mark.parametrize("app", ["locked"], indirect=True)

BODY = {"model": "sketch", "prompt": "a cat"}


@pytest.fixture
def accounts(redis: Redis, settings: Settings) -> AccountStore:
    return AccountStore.of(redis, settings)


async def user_with_key(accounts: AccountStore, name: str, role: Role = Role.user) -> tuple[str, str]:
    user = await accounts.users.add(name, f"{name}@example.org", role)
    scopes = set(Scope) if role is Role.admin else {Scope.read, Scope.generate}
    return user.id, (await accounts.keys.create(user.id, scopes))[1]


async def made(client: httpx.AsyncClient, key: str, count: int = 1) -> None:
    for _ in range(count):
        answer = await client.post("/v1/images/generations", json=BODY, headers=bearer(key))
        assert answer.status_code == 200, answer.text


async def usage(client: httpx.AsyncClient, key: str, **query: str) -> httpx.Response:
    return await client.get("/api/usage", params=query, headers=bearer(key))


async def test_callers_see_their_own_and_admins_everyones(
    client: httpx.AsyncClient, accounts: AccountStore, fake_model: FakeModel
) -> None:
    ann, key_of_ann = await user_with_key(accounts, "ann")
    bob, key_of_bob = await user_with_key(accounts, "bob")
    _, boss = await user_with_key(accounts, "boss", Role.admin)
    await made(client, key_of_ann, 2)
    await made(client, key_of_bob)

    own = (await usage(client, key_of_ann, by="user")).json()["usage"]
    everyones = (await usage(client, boss, by="user,model")).json()["usage"]
    one = (await usage(client, boss, by="", user=bob)).json()["usage"]

    assert [(row["user"], row["images"]) for row in own] == [(ann, 2)]
    assert {(row["user"], row["model"], row["images"]) for row in everyones} == {
        (ann, "sketch", 2),
        (bob, "sketch", 1),
    }
    assert [(row["user"], row["jobs"]) for row in one] == [(None, 1)]
    refused = await usage(client, key_of_ann, user=bob)
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "user")


async def test_a_table_for_spreadsheets(
    client: httpx.AsyncClient, accounts: AccountStore, fake_model: FakeModel
) -> None:
    _, key = await user_with_key(accounts, "ann")
    await made(client, key)

    answer = await usage(client, key, by="key,model", format="csv")

    [row] = csv.DictReader(io.StringIO(answer.text))
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert f"_{row['key']}." in key
    assert (row["model"], row["images"], row["jobs"]) == ("sketch", "1", "1")
    assert "user" not in row


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"by": "colour"}, "by"),
        ({"from": "2026-02-02", "to": "2026-02-01"}, "from"),
        ({"from": "yesterday"}, "from"),
        ({"format": "xml"}, "format"),
    ],
)
async def test_what_cannot_be_reported_is_refused_by_its_name(
    client: httpx.AsyncClient, query: dict[str, str], param: str
) -> None:
    answer = await client.get("/api/usage", params=query, headers=bearer(KEY))

    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == param


async def test_a_job_says_what_it_used(client: httpx.AsyncClient, fake_model: FakeModel) -> None:
    job_id = (await client.post("/api/generate/image", json=BODY, headers=bearer(KEY))).json()["id"]
    async with client.stream("GET", f"/api/generate/{job_id}/events", headers=bearer(KEY)) as events:
        await events.aread()

    job = (await client.get(f"/api/generate/{job_id}", headers=bearer(KEY))).json()

    used = job["usage"]
    pixels = job["request"]["width"] * job["request"]["height"]
    assert (used["images"], used["megapixels"]) == (1, pixels / 1e6)
    assert used["bytes"] >= job["artifacts"][0]["size_bytes"]
    assert used["cost"] == 0


async def test_a_user_with_a_budget_sees_it(client: httpx.AsyncClient, accounts: AccountStore) -> None:
    _, boss = await user_with_key(accounts, "boss", Role.admin)
    body = {"name": "Ann", "email": "ann@example.org", "budget_per_month": 12.5}

    added = await client.post("/admin/users", json=body, headers=bearer(boss))
    key = await client.post(f"/admin/users/{added.json()['id']}/keys", json={}, headers=bearer(boss))
    me = await client.get("/auth/me", headers=bearer(key.json()["api_key"]))

    assert me.json()["budget_per_month"] == 12.5
