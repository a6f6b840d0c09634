"""Routes x scopes x kinds of credential: every route asks for what the table says, of every credential."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field

import httpx
import pytest
import websockets
from fastapi import FastAPI
from redis.asyncio import Redis
from starlette.routing import WebSocketRoute
from websockets.asyncio.client import connect

from serve_app.admission.authenticator import AccountStore
from serve_app.admission.principals import Role, Scope
from serve_app.api.route_scopes import PUBLIC, ROUTE_SCOPES, route_name
from serve_app.settings import Settings
from tests.patience import patience
from tests.serving.api.conftest import KEY, client_of
from tests.serving.api.fake_model import FakeModel
from tests.serving.api.lora_files import lora_file
from tests.serving.api.test_access import FILLED, UNKNOWN, leaves
from tests.serving.conftest import MakeSettings

pytestmark = pytest.mark.parametrize("app", ["locked"], indirect=True)
LACKING = "it lacks the scope"
CSRF = {"X-Weft-CSRF": "1"}


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    """Without limits of calls, which the matrix would reach."""
    return make_settings(ui=False, submits_per_minute=10**6, reads_per_minute=10**6, logins_per_minute=10**6)


@pytest.fixture
def accounts(redis: Redis, settings: Settings) -> AccountStore:
    return AccountStore.of(redis, settings)


@dataclass(frozen=True)
class Credential:
    """How a caller identifies itself, and what that allows."""

    name: str
    allows: frozenset[Scope] | None  # None: it is no valid credential
    headers: dict[str, str] = field(default_factory=dict)
    query: dict[str, str] = field(default_factory=dict)


class Issuer:
    """Makes users with keys, and everything that is made from a key."""

    def __init__(self, client: httpx.AsyncClient, accounts: AccountStore) -> None:
        self._client, self._accounts = client, accounts
        self._numbers = itertools.count()

    async def key(self, scopes: frozenset[Scope], role: Role) -> str:
        name = f"user{next(self._numbers)}"
        user = await self._accounts.users.add(name, f"{name}@example.org", role)
        return (await self._accounts.keys.create(user.id, scopes))[1]

    async def all_of(self, name: str, key: str, allows: frozenset[Scope]) -> list[Credential]:
        """The key, and the token and cookie that it is exchanged for."""
        token = (await self._client.post("/auth/token", json={"api_key": key})).json()["access_token"]
        cookie = (await self._client.post("/auth/session", json={"api_key": key})).cookies["weft_session"]
        self._client.cookies.clear()
        by_cookie = {"Cookie": f"weft_session={cookie}", **CSRF}
        return [
            Credential(f"{name}, key", allows, {"Authorization": f"Bearer {key}"}),
            Credential(f"{name}, token", allows, {"Authorization": f"Bearer {token}"}),
            Credential(f"{name}, cookie", allows - {Scope.admin}, by_cookie),
        ]


async def credentials(client: httpx.AsyncClient, accounts: AccountStore) -> list[Credential]:
    issuer = Issuer(client, accounts)
    found = [
        Credential("nothing", None),
        Credential("a key that does not exist", None, {"Authorization": f"Bearer wf_{'0' * 12}.{'x' * 43}"}),
        Credential("a link's signature", None, query={"expires": "9999999999", "signature": "x" * 43}),
    ]
    for scopes in [frozenset({scope}) for scope in Scope] + [frozenset(Scope)]:
        key = await issuer.key(scopes, Role.admin)
        found += await issuer.all_of(f"an admin with {'+'.join(sorted(scopes))}", key, scopes)
    key = await issuer.key(frozenset(Scope), Role.user)
    found += await issuer.all_of("a user with all scopes", key, frozenset(Scope) - {Scope.admin})
    found += await issuer.all_of("the installation's own key", KEY, frozenset(Scope))
    found.append(Credential("the own key in X-API-Key", frozenset(Scope), {"X-API-Key": KEY}))
    reader = {"Authorization": f"Bearer {await issuer.key(frozenset({Scope.read}), Role.user)}"}
    ticket = (await client.post("/auth/ticket", headers=reader)).json()["ticket"]
    return [*found, Credential("a ticket", None, query={"ticket": ticket})]


def declared_routes(app: FastAPI) -> set[str]:
    """Every route of the app as the table names it, those outside of the documentation too."""
    found = set()
    for route in leaves(app.routes):
        methods = ["WEBSOCKET"] if isinstance(route, WebSocketRoute) else sorted(route.methods or {"GET"})
        found |= {route_name(method, route.path) for method in methods}
    for path, methods in app.openapi()["paths"].items():
        found |= {route_name(method.upper(), path) for method in methods}
    return {re.sub(r":\w+}", "}", route) for route in found}


def table() -> dict[str, Scope | None]:
    return {re.sub(r":\w+}", "}", route): scope for route, scope in ROUTE_SCOPES.items()}


def test_every_route_declares_what_it_needs_and_nothing_is_declared_twice(app: FastAPI) -> None:
    routes = declared_routes(app)

    assert routes - {"GET /openapi.json"} <= table().keys() | set(PUBLIC), "declare it in route_scopes.py"
    unused = table().keys() - routes
    assert not unused, "the table names routes that are gone"
    assert not table().keys() & set(PUBLIC)
    assert len(table()) > 40


async def test_every_route_asks_every_credential_for_its_scope(
    app: FastAPI, client: httpx.AsyncClient, accounts: AccountStore
) -> None:
    wrong = []

    for credential in await credentials(client, accounts):
        for route, scope in table().items():
            method, _, path = route.partition(" ")
            if method == "WEBSOCKET" or route == "DELETE /auth/session":  # the latter ends the credential
                continue
            filled = re.sub(r"{(\w+)}", lambda gap: FILLED.get(gap[1], UNKNOWN), path)
            answer = await client.request(
                method, filled, headers=credential.headers, params=credential.query, json={}
            )
            right = (
                answer.status_code == 401
                if credential.allows is None
                else (answer.status_code == 403 and LACKING in answer.text)
                == (scope is not None and scope not in credential.allows)
            )
            if not right or answer.status_code >= 500:
                wrong.append(f"{credential.name}: {route} -> {answer.status_code} {answer.text[:120]}")

    assert wrong == []


async def test_a_socket_asks_for_the_scope_too(app: FastAPI, address: str, accounts: AccountStore) -> None:
    async with client_of(app) as client:
        issuer = Issuer(client, accounts)
        keys = {scope: await issuer.key(frozenset({scope}), Role.admin) for scope in Scope}

    async def refusal(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        with pytest.raises(websockets.InvalidStatus) as refused:
            await connect(f"ws://{address}/ws/{UNKNOWN}", additional_headers=headers, open_timeout=patience())
        return refused.value.response.status_code

    statuses = {scope: await refusal(key) for scope, key in keys.items()}

    assert statuses == dict.fromkeys(Scope, 403) | {Scope.read: 404}


async def test_a_lora_for_all_users_takes_the_admin_scope_and_not_the_role_alone(
    client: httpx.AsyncClient, accounts: AccountStore
) -> None:
    issuer = Issuer(client, accounts)
    careful = await issuer.key(frozenset({Scope.read, Scope.generate}), Role.admin)
    boss = await issuer.key(frozenset({Scope.generate, Scope.admin, Scope.read}), Role.admin)
    user = await issuer.key(frozenset(Scope), Role.user)
    refused = [
        *await issuer.all_of("an admin's everyday key", careful, frozenset()),
        *await issuer.all_of("a user", user, frozenset()),
        (await issuer.all_of("the page of an admin", boss, frozenset()))[-1],
    ]
    upload = {"file": ("a.safetensors", lora_file(7))}
    by_boss = {"Authorization": f"Bearer {boss}"}

    tried = [
        await client.post("/api/loras", headers=who.headers, data={"public": "true"}, files=upload)
        for who in refused
    ]
    made = await client.post("/api/loras", headers=by_boss, data={"public": "true"}, files=upload)
    lora_id = made.json()["id"]
    seen = [(await client.get(f"/api/loras/{lora_id}", headers=who.headers)).json() for who in refused]
    deleted = [
        (await client.delete(f"/api/{kind}/{lora_id}", headers=who.headers)).status_code
        for who in refused
        for kind in ("loras", "models")
    ]

    assert {answer.status_code for answer in tried} == {403}
    assert all("'admin'" in answer.text for answer in tried)
    assert made.status_code == 201
    assert {adapter["mine"] for adapter in seen} == {False}
    assert set(deleted) == {403}
    assert (await client.delete(f"/api/loras/{lora_id}", headers=by_boss)).status_code == 200


async def test_the_webhook_secret_is_not_for_keys_that_only_read(
    client: httpx.AsyncClient, accounts: AccountStore, fake_model: FakeModel
) -> None:
    issuer = Issuer(client, accounts)
    reader = await issuer.all_of("reader", await issuer.key(frozenset({Scope.read}), Role.user), frozenset())
    maker = await issuer.key(frozenset({Scope.generate}), Role.user)

    refused = [(await client.get("/api/webhooks/secret", headers=who.headers)).status_code for who in reader]
    read = await client.get("/api/webhooks/secret", headers={"Authorization": f"Bearer {maker}"})

    assert set(refused) == {403}
    assert read.json()["secret"].startswith("whsec_")
