"""`weft users` and `weft keys`."""

from __future__ import annotations

import re

import pytest
from redis.asyncio import Redis

from deployments.protocol.errors import Unauthorized
from serve_app.admission.authenticator import AccountStore
from serve_app.admission.principals import Scope
from serve_app.cli.main import main
from serve_app.settings import Settings


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, valkey_url: str, settings: Settings) -> None:
    monkeypatch.setenv("REDIS_URL", valkey_url)
    monkeypatch.setenv("WEFT_REDIS_PREFIX", settings.redis_prefix)
    monkeypatch.setenv("WEFT_API_KEY", "the installation's own")


@pytest.mark.usefixtures("environment")
def test_a_user_gets_a_key_that_opens_until_it_is_revoked(
    capsys: pytest.CaptureFixture[str], valkey_url: str, settings: Settings
) -> None:
    assert main(["users", "add", "ann@example.org", "--name", "Ann", "--images-per-day", "5"]) == 0
    assert main(["keys", "create", "ann@example.org", "--scopes", "read", "--days", "2"]) == 0
    text = capsys.readouterr().out.split()[-1]

    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert main(["users", "list"]) == 0
    people = capsys.readouterr().out
    assert main(["keys", "revoke", listed.split()[0]]) == 0

    assert re.fullmatch(r"wf_[0-9a-f]{12}\.[A-Za-z0-9_-]{43}", text)
    assert "ann@example.org" in people
    assert "5 images/day" in people
    assert text.partition(".")[2] not in listed
    assert "revoked" in capsys.readouterr().out


@pytest.mark.usefixtures("environment")
def test_a_command_that_fails_has_status_1_and_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    main(["users", "add", "bob@example.org"])

    statuses = [
        main(["users", "add", "BOB@example.org"]),
        main(["users", "add", "unnamed"]),
        main(["users", "disable", "carol@example.org"]),
        main(["keys", "create", "bob@example.org", "--scopes", "everything"]),
        main(["keys", "create", "bob@example.org", "--scopes", "admin"]),
        main(["keys", "revoke", "wf_000000000000"]),
    ]

    errors = capsys.readouterr().err
    assert statuses == [1] * 6
    assert "there is a user with the e-mail bob@example.org" in errors
    assert "scopes are some of read, generate" in errors


async def test_the_key_of_another_prefix_does_not_open(redis: Redis, settings: Settings) -> None:
    accounts = AccountStore.of(redis, settings)
    user = await accounts.users.add("Ann", "ann@example.org")
    first, text = await accounts.keys.create(user.id, {Scope.read})
    second, _ = await accounts.keys.create(user.id, {Scope.read})

    with pytest.raises(Unauthorized):
        await accounts.keys.check(text.replace(first.prefix, second.prefix))

    assert (await accounts.keys.check(text)).prefix == first.prefix
