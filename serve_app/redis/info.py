"""What a Valkey or Redis server persists and permits, found by querying it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import redis

from serve_app.redis.transactions import time_us

TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class RedisInfo:
    """Properties of a server; None where it does not permit the query."""

    version: str | None
    aof: bool | None  # whether changes are written to disk
    appendfsync: str | None  # always, everysec or no
    eviction: str | None  # maxmemory-policy; any other than noeviction can lose jobs
    scripts: bool  # whether our account may run scripts
    foreign_keys: bool  # whether our account may read keys without our prefix
    admin: bool  # whether our account may reconfigure the server
    clock_ahead_s: float  # difference to this machine's clock


def query_info(url: str, prefix: str) -> RedisInfo:
    """Properties of the server at `url`, read only. Raises RuntimeError with the reason of a failure."""
    try:
        with redis.Redis.from_url(
            url, decode_responses=True, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
        ) as client:
            client.ping()
            before = time.time()
            now_us = time_us(client.time())
            here = (before + time.time()) / 2
            info: dict[str, Any] = {}
            with contextlib.suppress(redis.exceptions.NoPermissionError):
                for section in ("server", "persistence", "memory"):
                    info |= client.info(section)
            settings: dict[str, str] = {}
            with contextlib.suppress(redis.exceptions.ResponseError):
                settings = client.config_get("appendfsync")
            return RedisInfo(
                version=info.get("valkey_version") or info.get("redis_version"),
                aof=None if "aof_enabled" not in info else bool(info["aof_enabled"]),
                appendfsync=settings.get("appendfsync"),
                eviction=info.get("maxmemory_policy"),
                scripts=_allowed(client, "EVAL", "return 1", "0"),
                foreign_keys=_allowed(client, "EXISTS", f"not-{prefix}"),
                admin=_allowed(client, "CONFIG", "GET", "maxmemory"),
                clock_ahead_s=now_us / 1e6 - here,
            )
    except (redis.exceptions.RedisError, OSError, ValueError) as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _allowed(client: redis.Redis, *command: str) -> bool:
    try:
        client.execute_command(*command)  # type: ignore[no-untyped-call]
    except redis.exceptions.NoPermissionError:
        return False
    except redis.exceptions.ResponseError:
        return True  # permitted, and failed for another reason
    return True
