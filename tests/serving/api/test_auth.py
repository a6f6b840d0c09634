"""Logging in: a key becomes a token or the page's cookie, and both end when they should."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import httpx
import jwt
import pytest
from fastapi import FastAPI
from redis.asyncio import Redis

from deployments.protocol.errors import Unauthorized
from serve_app.admission.authenticator import AccountStore
from serve_app.admission.principals import Role, Scope
from serve_app.settings import Settings
from tests.patience import patience
from tests.serving.api.conftest import JWT_SECRET, KEY

pytestmark = pytest.mark.parametrize("app", ["locked"], indirect=True)
SUBMIT = {"prompt": "a fox", "model": "sketch"}
CSRF = {"X-Weft-CSRF": "1"}


@dataclass(frozen=True)
class Ann:
    """A user with a key."""

    id: str
    key: str
    key_prefix: str


@pytest.fixture
def accounts(redis: Redis, settings: Settings) -> AccountStore:
    return AccountStore.of(redis, settings)


@pytest.fixture
async def ann(accounts: AccountStore) -> Ann:
    user = await accounts.users.add("Ann", "Ann@example.org", images_per_day=50)
    key, text = await accounts.keys.create(user.id, {Scope.read, Scope.generate}, name="laptop")
    return Ann(user.id, text, key.prefix)


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


async def token_of(client: httpx.AsyncClient, key: str) -> str:
    answer = await client.post("/auth/token", json={"api_key": key})
    assert answer.status_code == 200, answer.text
    token: str = answer.json()["access_token"]
    return token


async def test_a_users_key_opens_and_identifies_them(client: httpx.AsyncClient, ann: Ann):
    me = (await client.get("/auth/me", headers=bearer(ann.key))).json()

    assert me == {
        "owner": ann.id,
        "role": "user",
        "scopes": ["generate", "read"],
        "images_per_day": 50,
        "budget_per_month": None,
    }


async def test_a_key_with_one_character_changed_is_refused(client: httpx.AsyncClient, ann: Ann):
    wrong = ann.key[:-1] + ("A" if ann.key[-1] != "A" else "B")

    answer = await client.get("/auth/me", headers=bearer(wrong))

    assert answer.status_code == 401
    assert wrong not in answer.text


async def test_a_revoked_key_and_its_tokens_are_refused_at_once(
    client: httpx.AsyncClient, ann: Ann, accounts: AccountStore
):
    token = await token_of(client, ann.key)
    assert (await client.get("/auth/me", headers=bearer(token))).status_code == 200

    await accounts.keys.revoke(ann.key_prefix)

    assert (await client.get("/auth/me", headers=bearer(ann.key))).status_code == 401
    assert (await client.get("/auth/me", headers=bearer(token))).status_code == 401


async def test_a_disabled_users_keys_are_refused_and_their_tokens_stay_so(
    client: httpx.AsyncClient, ann: Ann, accounts: AccountStore
):
    token = await token_of(client, ann.key)

    await accounts.users.set_disabled(ann.id, True)
    refused = await client.get("/auth/me", headers=bearer(ann.key))
    await accounts.users.set_disabled(ann.id, False)

    assert refused.status_code == 401
    assert (await client.get("/auth/me", headers=bearer(ann.key))).status_code == 200
    assert (await client.get("/auth/me", headers=bearer(token))).status_code == 401


async def test_an_expired_key_is_refused(
    client: httpx.AsyncClient, ann: Ann, accounts: AccountStore, redis: Redis
):
    key, text = await accounts.keys.create(ann.id, {Scope.read}, expires_in_s=3600)
    await redis.hset(f"{accounts.keys._prefix}key:{key.prefix}", "expires", str(time.time() - 1))

    assert (await client.get("/auth/me", headers=bearer(text))).status_code == 401


async def test_the_store_never_holds_a_keys_secret(client: httpx.AsyncClient, ann: Ann, redis: Redis):
    await token_of(client, ann.key)
    secret = ann.key.partition(".")[2]

    kept = [str(await redis.hgetall(key)) async for key in redis.scan_iter(match="weft:*", _type="hash")]

    assert any(ann.id in text for text in kept)
    assert not any(secret in text for text in kept)


async def test_a_token_is_for_a_day_and_logs_out(client: httpx.AsyncClient, ann: Ann):
    answer = (await client.post("/auth/token", json={"api_key": ann.key, "email": "ann@EXAMPLE.org"})).json()
    headers = bearer(answer["access_token"])
    assert (await client.get("/api/generate/", headers=headers)).status_code == 200

    out = await client.delete("/auth/session", headers=headers)

    assert (answer["expires_in"], answer["token_type"]) == (86_400, "bearer")
    assert abs(answer["expires_at"] - time.time() - 86_400) < patience(2)
    assert out.status_code == 200
    assert (await client.get("/api/generate/", headers=headers)).status_code == 401


async def test_another_e_mail_than_the_keys_users_is_refused(client: httpx.AsyncClient, ann: Ann):
    answer = await client.post("/auth/token", json={"api_key": ann.key, "email": "bob@example.org"})

    assert answer.status_code == 401


async def test_a_token_buys_no_further_token(client: httpx.AsyncClient, ann: Ann):
    token = await token_of(client, ann.key)

    assert (await client.post("/auth/token", headers=bearer(token))).status_code == 401


@pytest.mark.parametrize(
    "change",
    [
        {"exp": 1_000_000_000},
        {"exp": None},
        {"jti": None},
        {"iat": None},
        {"aud": "another"},
        {"iss": "another"},
        {"sub": 7},
        {"key": None},
    ],
    ids=str,
)
async def test_a_token_that_lacks_or_bends_a_claim_is_refused(
    client: httpx.AsyncClient, ann: Ann, change: dict[str, object]
):
    good = jwt.decode(
        await token_of(client, ann.key), JWT_SECRET, algorithms=["HS256"], audience="weft", issuer="weft"
    )
    bent = {name: value for name, value in (good | change).items() if value is not None}

    answers = [
        await client.get("/auth/me", headers=bearer(encoded(payload))) for payload in (dict(good), bent)
    ]

    assert [answer.status_code for answer in answers] == [200, 401]


def encoded(payload: dict[str, object]) -> str:
    if isinstance(payload["sub"], int):  # PyJWT writes no such thing by itself
        return jwt.api_jws.encode(str(payload).replace("'", '"').encode(), JWT_SECRET, algorithm="HS256")
    return jwt.encode(payload, JWT_SECRET, algorithm="HS256")


ODD = [
    None,
    True,
    7,
    -1,
    1.5,
    float("inf"),
    10**400,
    "",
    "\0",
    "\ud800",
    "x" * 500,
    "é",
    [],
    ["read"],
    {},
    [[]] * 9,
]
CLAIMS = ["sub", "key", "scope", "epoch", "jti", "iat", "exp", "aud", "iss", "nbf"]
HARMLESS = [  # a scope of none; times that are past or, of the end, far away
    ("scope", ""), ("iat", 7), ("iat", -1), ("exp", 10**400), ("nbf", None), ("nbf", True), ("nbf", 7),
    ("nbf", -1), ("nbf", 1.5),
]  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
async def test_a_signed_token_with_a_claim_of_another_type_or_value_is_refused_and_breaks_nothing(
    client: httpx.AsyncClient, ann: Ann, app: FastAPI, claim: str
):
    authenticator = app.state.weft.authenticator  # below the limit of wrong keys
    good = jwt.decode(
        await token_of(client, ann.key), JWT_SECRET, algorithms=["HS256"], audience="weft", issuer="weft"
    )
    forged = [
        jwt.api_jws.encode(json.dumps(good | {claim: value}).encode(), JWT_SECRET, algorithm="HS256")
        for value in ODD
        if (claim, value) not in HARMLESS
    ]

    for token in forged:
        with pytest.raises(Unauthorized, match="token"):
            await authenticator.identify(token.encode())

    assert len(forged) > 5


@pytest.mark.parametrize(
    "scope", ["read launch", "launch", "READ", "read,generate", "read generate admin launch"]
)
async def test_a_token_with_a_scope_that_does_not_exist_is_refused(
    client: httpx.AsyncClient, ann: Ann, scope: str
):
    good = jwt.decode(
        await token_of(client, ann.key), JWT_SECRET, algorithms=["HS256"], audience="weft", issuer="weft"
    )

    answer = await client.get("/api/generate/", headers=bearer(encoded(good | {"scope": scope})))

    assert answer.status_code == 401


async def test_a_scope_or_role_in_the_store_that_a_newer_version_wrote_allows_nothing(
    client: httpx.AsyncClient, ann: Ann, accounts: AccountStore, redis: Redis, settings: Settings
):
    await redis.hset(f"{settings.redis_prefix}key:{ann.key_prefix}", "scopes", "launch read")
    await redis.hset(accounts.users.key(ann.id), "role", "captain")

    me = (await client.get("/auth/me", headers=bearer(ann.key))).json()

    assert (me["role"], me["scopes"]) == ("user", ["read"])


@pytest.mark.parametrize(
    ("algorithm", "secret"), [("none", None), ("HS512", JWT_SECRET * 2), ("HS256", "x" * 40)]
)
async def test_only_our_algorithm_and_secret_sign(
    client: httpx.AsyncClient, ann: Ann, algorithm: str, secret: str | None
):
    good = jwt.decode(
        await token_of(client, ann.key), JWT_SECRET, algorithms=["HS256"], audience="weft", issuer="weft"
    )
    forged = jwt.encode(good, secret, algorithm=algorithm)  # type: ignore[arg-type]

    assert (await client.get("/auth/me", headers=bearer(forged))).status_code == 401


async def test_the_installations_own_key_gets_tokens_too(client: httpx.AsyncClient):
    token = await token_of(client, KEY)

    me = (await client.get("/auth/me", headers=bearer(token))).json()

    assert (me["owner"], me["role"]) == ("local", "admin")


async def test_the_page_logs_in_with_a_cookie_that_scripts_cannot_read(client: httpx.AsyncClient, ann: Ann):
    answer = await client.post("/auth/session", json={"api_key": ann.key})

    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "secure" not in cookie  # this one came over http on loopback
    assert ann.key not in answer.text
    assert (await client.get("/api/generate/")).status_code == 200


async def test_over_https_the_cookie_is_secure(app: FastAPI, ann: Ann):
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="https://127.0.0.1") as client:
        answer = await client.post("/auth/session", json={"api_key": ann.key})

    assert "secure" in answer.headers["set-cookie"].lower()


async def test_a_cookie_changes_nothing_without_the_csrf_header_or_from_another_site(
    client: httpx.AsyncClient, ann: Ann
):
    await client.post("/auth/session", json={"api_key": ann.key})

    bare = await client.post("/api/generate/image", json=SUBMIT)
    foreign = await client.post(
        "/api/generate/image", json=SUBMIT, headers={**CSRF, "Origin": "https://evil.example"}
    )
    ours = await client.post(
        "/api/generate/image", json=SUBMIT, headers={**CSRF, "Origin": "http://127.0.0.1"}
    )

    assert [bare.status_code, foreign.status_code, ours.status_code] == [403, 403, 202]


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "null", "//", "http://127.0.0.1:x"])
async def test_a_cookie_with_an_origin_that_is_no_address_is_refused(
    client: httpx.AsyncClient, ann: Ann, origin: str
):
    await client.post("/auth/session", json={"api_key": ann.key})

    answer = await client.post("/auth/ticket", headers=CSRF | {"Origin": origin})

    assert answer.status_code == 403


async def test_logging_out_ends_the_cookie_wherever_it_was_copied_to(client: httpx.AsyncClient, ann: Ann):
    await client.post("/auth/session", json={"api_key": ann.key})
    copied = client.cookies["weft_session"]

    out = await client.delete("/auth/session", headers=CSRF)

    assert out.status_code == 200
    assert "weft_session" not in client.cookies
    assert (
        await client.get("/api/generate/", headers={"Cookie": f"weft_session={copied}"})
    ).status_code == 401


async def test_a_session_has_no_admin_scope_even_for_admins(
    client: httpx.AsyncClient, accounts: AccountStore
):
    boss = await accounts.users.add("Boss", "boss@example.org", Role.admin)
    _, text = await accounts.keys.create(boss.id, set(Scope))
    await client.post("/auth/session", json={"api_key": text})

    assert (await client.get("/admin/users")).status_code == 403
    assert (await client.get("/admin/users", headers=bearer(text))).status_code == 200


async def test_the_eleventh_log_in_of_a_minute_from_one_address_waits(client: httpx.AsyncClient, ann: Ann):
    tries = [await client.post("/auth/token", json={"api_key": "wrong"}) for _ in range(11)]
    forwarded = await client.post(
        "/auth/token", json={"api_key": "wrong"}, headers={"X-Forwarded-For": "6.6.6.6"}
    )

    assert [answer.status_code for answer in tries] == [401] * 10 + [429]
    assert 0 < int(tries[-1].headers["retry-after"]) <= 60
    assert 0 < int(tries[-1].headers["retry-after-ms"]) <= 60_000
    assert forwarded.status_code == 429
    assert (await client.get("/auth/me", headers=bearer(ann.key))).status_code == 200


async def test_wrong_keys_on_any_route_count_as_log_ins(client: httpx.AsyncClient):
    tries = [await client.get("/api/models/", headers=bearer(f"wrong{n}")) for n in range(11)]

    assert [answer.status_code for answer in tries] == [401] * 10 + [429]


async def test_calling_without_any_key_is_not_counted(client: httpx.AsyncClient):
    tries = {(await client.get("/api/models/")).status_code for _ in range(15)}

    assert tries == {401}
