"""A real Valkey for the whole session, a key prefix and a folder per test, and a remote web server."""

from __future__ import annotations

import itertools
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from serve_app.jobs.store.store import JobStore
from serve_app.redis.embedded import EmbeddedRedis
from serve_app.redis.transactions import connect
from serve_app.settings import Settings
from serve_app.storage.results import ResultStore
from tests.patience import slowness
from tests.serving.remote_server import RemoteServer, certificate

_PREFIXES = (f"weft:test{number}:" for number in itertools.count())

MakeSettings = Callable[..., Settings]


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis(tmp_path_factory.mktemp("data")) as url:
        yield url


@pytest.fixture
def make_settings(tmp_path: Path) -> MakeSettings:
    prefix = next(_PREFIXES)

    def make(**changes: object) -> Settings:
        quick = {
            "lease_s": 2.0 * slowness(),
            "heartbeat_s": 0.1,
            "data_dir": tmp_path,
            "redis_prefix": prefix,
        }
        return Settings(_env_file=None, **{**quick, **changes})

    return make


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    return make_settings()


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[Redis]:
    async with connect(valkey_url) as client:
        yield client


@pytest.fixture
def store(redis: Redis, settings: Settings) -> JobStore:
    return JobStore(redis, settings)


@pytest.fixture
def results(tmp_path: Path) -> ResultStore:
    return ResultStore(str(tmp_path / "results"), min_free_bytes=0)


@pytest.fixture(scope="session")
def certified(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return certificate(tmp_path_factory.mktemp("far"))


@pytest.fixture
async def remote(certified: tuple[ssl.SSLContext, ssl.SSLContext]) -> AsyncIterator[RemoteServer]:
    server = RemoteServer(certified)
    await server.start()
    yield server
    await server.stop()
