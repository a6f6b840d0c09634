"""`weft users` and `weft keys`: the installation's accounts from the command line."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime

from deployments.protocol.errors import BadRequest
from serve_app.admission.api_keys import ApiKey
from serve_app.admission.authenticator import AccountStore
from serve_app.admission.principals import USER_SCOPES, Role, Scope
from serve_app.admission.users import User
from serve_app.redis.embedded import EmbeddedRedis, running_server
from serve_app.redis.transactions import connect
from serve_app.settings import Settings

DAY_S = 86_400.0
Parsers = argparse._SubParsersAction  # argparse gives it no public name


def add_commands(commands: Parsers[argparse.ArgumentParser]) -> None:
    """Declare both commands."""
    users = commands.add_parser("users", help="add, list and disable users")
    verbs = users.add_subparsers(dest="verb", required=True)
    add = verbs.add_parser("add", help="add a user; give them a key next")
    add.add_argument("email")
    add.add_argument("--name", help="default: the e-mail")
    add.add_argument("--role", choices=[role.value for role in Role], default=Role.user.value)
    add.add_argument("--images-per-day", type=int, help="default: no limit")
    verbs.add_parser("list", help="list all users")
    for verb in ("disable", "enable"):
        change = verbs.add_parser(verb, help=f"{verb} a user; their tokens end either way")
        change.add_argument("user", help="e-mail or id")

    keys = commands.add_parser("keys", help="create, list and revoke API keys")
    verbs = keys.add_subparsers(dest="verb", required=True)
    create = verbs.add_parser("create", help="make a key; it is shown once")
    create.add_argument("user", help="e-mail or id of whom it is for")
    create.add_argument("--name", default="", help="what it is for")
    create.add_argument(
        "--scopes",
        default=",".join(sorted(USER_SCOPES)),
        help=f"of {', '.join(Scope)} (default: %(default)s)",
    )
    create.add_argument("--days", type=float, help="its life (default: no end)")
    verbs.add_parser("list", help="list all keys, without their secrets")
    verbs.add_parser("revoke", help="end a key").add_argument("prefix", help="its name in the list")


def run(options: argparse.Namespace, settings: Settings, report: Callable[[str], None]) -> int:
    """Exit status. Raises WeftError, and RuntimeError when there is no store to write to."""
    with _store(settings) as url:
        asyncio.run(_run(options, settings, url, report))
    return 0


async def _run(
    options: argparse.Namespace, settings: Settings, url: str, report: Callable[[str], None]
) -> None:
    verbs: dict[tuple[str, str], Callable[[argparse.Namespace, AccountStore], Awaitable[str]]] = {
        ("users", "add"): _add_user,
        ("users", "list"): _list_users,
        ("users", "disable"): _disable_user,
        ("users", "enable"): _enable_user,
        ("keys", "create"): _create_key,
        ("keys", "list"): _list_keys,
        ("keys", "revoke"): _revoke_key,
    }
    async with connect(url) as redis:
        report(await verbs[options.command, options.verb](options, AccountStore.of(redis, settings)))
    if settings.auth_disabled and options.verb in ("add", "create"):
        report("Note: WEFT_API_KEY is not set, so on loopback everybody may call without any key.")


async def _add_user(options: argparse.Namespace, accounts: AccountStore) -> str:
    user = await accounts.users.add(
        options.name or options.email, options.email, Role(options.role), options.images_per_day
    )
    return f"{_user_line(user)}\nNext: weft keys create {user.email}"


async def _list_users(_: argparse.Namespace, accounts: AccountStore) -> str:
    return "\n".join(_user_line(user) for user in await accounts.users.list()) or "no users"


async def _disable_user(options: argparse.Namespace, accounts: AccountStore) -> str:
    user = await accounts.users.find(options.user)
    return _user_line(await accounts.users.set_disabled(user.id, True))


async def _enable_user(options: argparse.Namespace, accounts: AccountStore) -> str:
    user = await accounts.users.find(options.user)
    return _user_line(await accounts.users.set_disabled(user.id, False))


async def _create_key(options: argparse.Namespace, accounts: AccountStore) -> str:
    user = await accounts.users.find(options.user)
    try:
        scopes = {Scope(name.strip()) for name in options.scopes.split(",") if name.strip()}
    except ValueError:
        raise BadRequest(f"scopes are some of {', '.join(Scope)}, separated by commas") from None
    if Scope.admin in scopes and user.role is not Role.admin:
        raise BadRequest(f"{user.email} is no admin; leave out the scope 'admin'")
    life_s = None if options.days is None else options.days * DAY_S
    key, text = await accounts.keys.create(user.id, scopes, name=options.name, expires_in_s=life_s)
    return f"{_key_line(key)}\nThe key, shown this once:\n{text}"


async def _list_keys(_: argparse.Namespace, accounts: AccountStore) -> str:
    return "\n".join(_key_line(key) for key in await accounts.keys.list()) or "no keys"


async def _revoke_key(options: argparse.Namespace, accounts: AccountStore) -> str:
    return _key_line(await accounts.keys.revoke(options.prefix.removeprefix("wf_")))


def _user_line(user: User) -> str:
    quota = "no limit" if user.images_per_day is None else f"{user.images_per_day} images/day"
    state = "disabled" if user.disabled else "enabled"
    return f"{user.id}  {user.email:32} {user.role.value:6} {quota:18} {state:9} {user.name}"


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


@contextlib.contextmanager
def _store(settings: Settings) -> Iterator[str]:
    """The store's URL: the configured one, the one of a running `weft serve`, or one started for us."""
    if settings.redis_url is not None:
        yield settings.redis_url.get_secret_value()
        return
    running = running_server(settings.data_dir)
    if running is not None:
        yield running
        return
    with EmbeddedRedis(settings.data_dir, settings.redis_prefix) as url:
        yield url
