"""`weft users` and `weft keys`: the accounts of this installation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated

import typer

from deployments.protocol.errors import BadRequest
from serve_app.admission.api_keys import ApiKey
from serve_app.admission.authenticator import AccountStore
from serve_app.admission.principals import USER_SCOPES, Role, Scope
from serve_app.admission.users import User
from serve_app.cli.store_url import store_url
from serve_app.redis.transactions import connect
from serve_app.settings import Settings

DAY_S = 86_400.0
NO_AUTH_NOTE = "Note: WEFT_API_KEY is not set, so on loopback everybody may call without any key."

users = typer.Typer(add_completion=False, rich_markup_mode=None, help="Add, list, disable and enable users.")
keys = typer.Typer(add_completion=False, rich_markup_mode=None, help="Create, list and revoke API keys.")

UserArgument = Annotated[str, typer.Argument(metavar="user", help="E-mail address or id of the user.")]


@users.command("add")
def add_user(
    email: Annotated[str, typer.Argument(metavar="email", help="E-mail address of the user.")],
    name: Annotated[str | None, typer.Option(help="Name of the user.  Default: the e-mail address.")] = None,
    role: Annotated[Role, typer.Option(help="What the user may do.")] = Role.user,
    images_per_day: Annotated[int | None, typer.Option(help="Quota of images.  Default: no limit.")] = None,
    budget_per_month: Annotated[
        float | None,
        typer.Option(help="What jobs may cost by the models' price_per_device_second.  Default: no limit."),
    ] = None,
) -> None:
    """Add a user.  Create a key for the user next."""

    async def add(accounts: AccountStore) -> str:
        user = await accounts.users.add(name or email, email, role, images_per_day, budget_per_month)
        return f"{_user_line(user)}\nNext: weft keys create {user.email}"

    if _run(add).auth_disabled:
        print(NO_AUTH_NOTE)


@users.command("list")
def list_users() -> None:
    """List all users."""

    async def list_all(accounts: AccountStore) -> str:
        return "\n".join(_user_line(user) for user in await accounts.users.list()) or "no users"

    _run(list_all)


@users.command("disable")
def disable_user(user: UserArgument) -> None:
    """Disable a user.  All tokens of the user become invalid."""
    _set_disabled(user, True)


@users.command("enable")
def enable_user(user: UserArgument) -> None:
    """Enable a user again.  All tokens of the user become invalid."""
    _set_disabled(user, False)


@keys.command("create")
def create_key(
    user: UserArgument,
    name: Annotated[str, typer.Option(help="What the key is for.")] = "",
    scopes: Annotated[str, typer.Option(help=f"Comma-separated list of {', '.join(Scope)}.")] = ",".join(
        sorted(USER_SCOPES)
    ),
    days: Annotated[float | None, typer.Option(help="Days until the key expires.  Default: never.")] = None,
) -> None:
    """Create an API key.  It is printed once."""

    async def create(accounts: AccountStore) -> str:
        owner = await accounts.users.find(user)
        wanted = _parse_scopes(scopes)
        if Scope.admin in wanted and owner.role is not Role.admin:
            raise BadRequest(f"{owner.email} is no admin; leave out the scope 'admin'")
        life_s = None if days is None else days * DAY_S
        key, text = await accounts.keys.create(owner.id, wanted, name=name, expires_in_s=life_s)
        return f"{_key_line(key)}\nThe key, shown this once:\n{text}"

    if _run(create).auth_disabled:
        print(NO_AUTH_NOTE)


@keys.command("list")
def list_keys() -> None:
    """List all keys, without their secrets."""

    async def list_all(accounts: AccountStore) -> str:
        return "\n".join(_key_line(key) for key in await accounts.keys.list()) or "no keys"

    _run(list_all)


@keys.command("revoke")
def revoke_key(
    prefix: Annotated[str, typer.Argument(metavar="prefix", help="The key's name in `weft keys list`.")],
) -> None:
    """Revoke a key: it becomes invalid at once."""

    async def revoke(accounts: AccountStore) -> str:
        return _key_line(await accounts.keys.revoke(prefix.removeprefix("wf_")))

    _run(revoke)


def _set_disabled(id_or_email: str, disabled: bool) -> None:
    async def change(accounts: AccountStore) -> str:
        user = await accounts.users.find(id_or_email)
        return _user_line(await accounts.users.set_disabled(user.id, disabled))

    _run(change)


def _parse_scopes(text: str) -> set[Scope]:
    try:
        return {Scope(name.strip()) for name in text.split(",") if name.strip()}
    except ValueError:
        raise BadRequest(f"scopes are some of {', '.join(Scope)}, separated by commas") from None


def _run(command: Callable[[AccountStore], Awaitable[str]]) -> Settings:
    """Print what `command` returns for the accounts of this installation; returns the settings it used.

    Raises WeftError, and RuntimeError when no store can be reached or started.
    """
    settings = Settings.load()

    async def run(url: str) -> str:
        async with connect(url) as redis:
            return await command(AccountStore.of(redis, settings))

    with store_url(settings) as url:
        print(asyncio.run(run(url)), flush=True)
    return settings


def _user_line(user: User) -> str:
    quota = "no limit" if user.images_per_day is None else f"{user.images_per_day} images/day"
    budget = "no budget" if user.budget_per_month is None else f"{user.budget_per_month:g}/month"
    state = "disabled" if user.disabled else "enabled"
    return f"{user.id}  {user.email:32} {user.role.value:6} {quota:18} {budget:12} {state:9} {user.name}"


def _key_line(key: ApiKey) -> str:
    if key.revoked_at is not None:
        state = f"revoked {_day(key.revoked_at)}"
    elif key.expires_at is not None:
        state = f"until {_day(key.expires_at)}"
    else:
        state = "no end"
    scopes = ",".join(sorted(key.scopes))
    return f"wf_{key.prefix}  {key.user_id}  {scopes:22} {state:20} {key.name}".rstrip()


def _day(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).date().isoformat()
