"""Users in the account store."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from deployments.protocol.errors import BadRequest, Conflict, NotFound
from serve_app.admission.principals import Role
from serve_app.admission.users import User, Users
from serve_app.settings import Settings


@pytest.fixture
def users(redis: Redis, settings: Settings) -> Users:
    return Users(redis, settings.redis_prefix)


async def test_a_user_is_found_by_id_and_by_e_mail_in_whatever_case(users: Users) -> None:
    ann = await users.add("Ann", "Ann@Example.org", Role.admin, 5)

    assert await users.get(ann.id) == ann
    assert await users.find("ANN@example.ORG") == ann
    assert await users.list() == [ann]
    assert (ann.email, ann.role, ann.images_per_day) == ("ann@example.org", Role.admin, 5)


async def test_of_two_who_add_the_same_e_mail_at_once_one_is_refused(users: Users) -> None:
    outcomes = await asyncio.gather(
        *(users.add(f"Ann {n}", "ann@example.org") for n in range(6)), return_exceptions=True
    )

    assert sum(isinstance(outcome, User) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 5
    assert len(await users.list()) == 1


@pytest.mark.parametrize(
    ("name", "email", "quota"),
    [
        ("Ann", "ann", None),
        ("Ann", "a b@c.org", None),
        ("", "a@c.org", None),
        ("A\nB", "a@c.org", None),
        ("Ann", "a@c.org", -1),
        ("Ann", "ann@c..org", None),
        ("x" * 101, "a@c.org", None),
    ],
)
async def test_what_is_not_valid_is_refused(users: Users, name: str, email: str, quota: int | None) -> None:
    with pytest.raises(BadRequest):
        await users.add(name, email, images_per_day=quota)


async def test_a_user_who_never_was_is_not_found(users: Users) -> None:
    for name in ("0" * 16, "stranger@example.org", ""):
        with pytest.raises(NotFound):
            await users.find(name)
