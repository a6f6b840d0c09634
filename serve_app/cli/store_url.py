"""The job store that a command of `weft` uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from serve_app.redis.embedded import EmbeddedRedis, running_server
from serve_app.redis.reachable import check_redis
from serve_app.settings import Settings


@contextlib.contextmanager
def store_url(settings: Settings) -> Iterator[str]:
    """URL of the configured store, else of a running `weft serve`'s, else of one started for this block."""
    if settings.redis_url is not None:
        url = settings.redis_url.get_secret_value()
        check_redis(url, settings.redis_prefix)
        yield url
    elif (running := running_server(settings.data_dir)) is not None:
        yield running
    else:
        with EmbeddedRedis(settings.data_dir, settings.redis_prefix) as url:
            yield url
