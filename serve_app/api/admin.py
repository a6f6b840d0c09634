"""/admin: users and their keys, for admins with a bearer key (never with the page's cookie)."""

from fastapi import APIRouter
from starlette.requests import Request

from deployments.protocol.errors import BadRequest, Conflict
from serve_app.admission.authenticator import AccountStore
from serve_app.admission.principals import Role, Scope
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext
from serve_app.api.request_body import documented, read_json
from serve_app.api.schemas.access import (
    KeyBody,
    KeyCreated,
    KeyList,
    KeyOut,
    UserBody,
    UserChange,
    UserList,
    UserOut,
)

router = APIRouter(tags=["admin"])


@router.get("/admin/users")
async def list_users(caller: CurrentCaller) -> UserList:
    """All users, the oldest first."""
    return UserList(users=[UserOut.of(user) for user in await _accounts(caller).users.list()])


@router.post("/admin/users", status_code=201, openapi_extra=documented(UserBody))
async def add_user(http_request: Request, caller: CurrentCaller) -> UserOut:
    """A new user, who still needs a key."""
    body = await read_json(http_request, UserBody)
    user = await _accounts(caller).users.add(
        body.name, body.email, body.role, body.images_per_day, body.budget_per_month
    )
    return UserOut.of(user)


@router.patch("/admin/users/{user_id}", openapi_extra=documented(UserChange))
async def change_user(http_request: Request, user_id: str, caller: CurrentCaller) -> UserOut:
    """Disable a user, whose keys and tokens are then refused, or enable them again."""
    body = await read_json(http_request, UserChange)
    return UserOut.of(await _accounts(caller).users.set_disabled(user_id, body.disabled))


@router.post("/admin/users/{user_id}/keys", status_code=201, openapi_extra=documented(KeyBody))
async def create_key(http_request: Request, user_id: str, caller: CurrentCaller) -> KeyCreated:
    """A new key of this user. Its text is in this answer and is stored nowhere."""
    body = await read_json(http_request, KeyBody)
    accounts = _accounts(caller)
    user = await accounts.users.get(user_id)
    if Scope.admin in body.scopes and user.role is not Role.admin:
        raise BadRequest("only an admin's key can have the scope 'admin'", param="scopes")
    key, text = await accounts.keys.create(
        user.id, set(body.scopes), name=body.name, expires_in_s=body.expires_in_s
    )
    return KeyCreated(key=KeyOut.of(key), api_key=text)


@router.get("/admin/keys")
async def list_keys(caller: CurrentCaller) -> KeyList:
    """All keys, without their secrets."""
    return KeyList(keys=[KeyOut.of(key) for key in await _accounts(caller).keys.list()])


@router.delete("/admin/keys/{prefix}")
async def revoke_key(prefix: str, caller: CurrentCaller) -> KeyOut:
    """The key is refused from now on, and so are tokens made from it."""
    return KeyOut.of(await _accounts(caller).keys.revoke(prefix))


def _accounts(caller: CallerContext) -> AccountStore:
    accounts = caller.state.authenticator.accounts
    if accounts is None:
        raise Conflict("this service keeps no users; connect it to its store")
    return accounts
