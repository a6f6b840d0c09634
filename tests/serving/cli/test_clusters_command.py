"""`weft clusters`."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.cli.main import main
from serve_app.jobs.store.store import JobStore
from serve_app.redis.transactions import connect
from serve_app.settings import Settings


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, valkey_url: str, settings: Settings) -> None:
    monkeypatch.setenv("REDIS_URL", valkey_url)
    monkeypatch.setenv("WEFT_REDIS_PREFIX", settings.redis_prefix)


def report(valkey_url: str, settings: Settings, cluster: str, *, ready: bool) -> None:
    """What a dispatcher of this cluster writes each second."""

    async def write() -> None:
        async with connect(valkey_url) as redis:
            records = JobStore(redis, settings).clusters
            await records.report(cluster, release="0.1.0", place="10.0.0.7:6379", ready=ready)

    asyncio.run(write())


@pytest.mark.usefixtures("environment")
def test_clusters_are_listed_stopped_and_used(
    capsys: pytest.CaptureFixture[str], valkey_url: str, settings: Settings
) -> None:
    assert main(["clusters", "list"]) == 0
    assert "no cluster uses this store" in capsys.readouterr().out
    report(valkey_url, settings, "weft@1", ready=True)
    report(valkey_url, settings, "weft@2", ready=False)

    def listed() -> list[tuple[str, str]]:
        assert main(["clusters", "list"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert all("10.0.0.7:6379" in line for line in lines)
        return [(line[0], line[1]) for line in lines]

    assert listed() == [("weft@1", "ready"), ("weft@2", "starting")]
    assert main(["clusters", "stop", "weft@2"]) == 0
    assert "claims no more jobs" in capsys.readouterr().out
    assert listed() == [("weft@1", "ready"), ("weft@2", "stopped")]
    assert main(["clusters", "use", "weft@1"]) == 0
    assert "as soon as it is ready" in capsys.readouterr().out
    assert listed() == [("weft@2", "stopped"), ("weft@1", "ready")]  # the newest last
    assert main(["clusters", "use", "weft@9"]) == 1
    assert "weft clusters list names those" in capsys.readouterr().err
