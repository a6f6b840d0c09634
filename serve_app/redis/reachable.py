"""Whether the Redis or Valkey of REDIS_URL can be used as the job store, found before anything starts."""

from __future__ import annotations

from urllib.parse import SplitResult, parse_qsl, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from deployments.protocol.errors import BadRequest

LIMIT_S = 2.0  # for the connection, and for each answer
FORM = "redis://user:password@host:6379/0, with rediss:// for TLS, or unix://path"

REFUSALS: dict[type[Exception], str] = {  # the first that fits
    redis.exceptions.BusyLoadingError: (
        "the Redis at {place} is still loading its data; start again when it has"
    ),
    redis.exceptions.NoPermissionError: (
        "the Redis at {place} does not let this user write our keys; give it the rules of docs/security.md"
    ),
    redis.exceptions.ReadOnlyError: (
        "the Redis at {place} is a read-only replica; name its primary in REDIS_URL"
    ),
    redis.exceptions.OutOfMemoryError: (
        "the Redis at {place} has reached its maxmemory and refuses writes; raise it"
    ),
    redis.exceptions.TimeoutError: (
        f"the Redis at {{place}} does not answer within {LIMIT_S:.0f} s; start it, or correct REDIS_URL"
    ),
    redis.exceptions.InvalidResponse: (
        "what listens at {place} is not a Redis; correct host and port in REDIS_URL"
    ),
    redis.exceptions.ResponseError: (
        "the Redis at {place} refuses to write ({text}); correct that, or name another in REDIS_URL"
    ),
}


def check_redis(url: str, prefix: str) -> None:
    """Returns when a key with this prefix can be written at `url`.

    Raises BadRequest with one sentence on what is wrong and what would be right; the password is not in it.
    """
    parts = _parts(url)
    try:
        with redis.Redis.from_url(
            url, socket_timeout=LIMIT_S, socket_connect_timeout=LIMIT_S, retry=Retry(NoBackoff(), 0)
        ) as client:
            client.ping()
            client.set(f"{prefix}start-check", "1", ex=10)
    except (redis.exceptions.RedisError, OSError, TypeError, ValueError) as error:
        raise BadRequest(_sentence(error, _place(parts), has_password=bool(parts.password))) from None


def _parts(url: str) -> SplitResult:
    if "://" not in url:
        raise BadRequest(f"REDIS_URL has no scheme; write {FORM}")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise BadRequest(
            "REDIS_URL has a port that is not a number up to 65535; if a password holds / ? # or @, write "
            "those as %2F %3F %23 %40"
        ) from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise BadRequest(f"REDIS_URL begins with {parts.scheme}://; write {FORM}")
    database = parts.path.strip("/") if parts.scheme != "unix" else ""
    if database and not database.isdecimal():
        raise BadRequest("REDIS_URL ends with a path that is not the number of a database, such as /0")
    try:
        parse_url(url)  # type: ignore[no-untyped-call]
    except (ValueError, TypeError) as error:
        names = ", ".join(name for name, _ in parse_qsl(parts.query)) or "its query"
        raise BadRequest(f"REDIS_URL has an option that is not valid ({names}): {error}") from None
    return parts


def _place(parts: SplitResult) -> str:
    if parts.scheme == "unix":
        return parts.path
    return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"


def _sentence(error: Exception, place: str, *, has_password: bool) -> str:
    """What is wrong with the server at `place`."""
    if isinstance(error, redis.exceptions.AuthenticationError):
        if has_password:
            return f"the Redis at {place} refuses user or password; correct them in REDIS_URL"
        return f"the Redis at {place} wants a password; write it into REDIS_URL: {FORM}"
    for kind, words in REFUSALS.items():
        if isinstance(error, kind):
            return words.format(place=place, text=error)
    if isinstance(error, redis.exceptions.ConnectionError | OSError):
        return _unreachable(str(error), place)
    # TypeError: an option of the URL that redis-py passes on and its connection does not know
    return f"REDIS_URL has an option that is not known; write {FORM}"


def _unreachable(text: str, place: str) -> str:
    if "SSL" in text or "CERTIFICATE" in text.upper():
        return f"TLS with the Redis at {place} failed ({text}); without TLS, write redis://"
    if "closed" in text:
        return f"the Redis at {place} closed the connection; if it wants TLS, write rediss:// in REDIS_URL"
    return f"no Redis can be reached at {place} ({text}); start it, or correct REDIS_URL"
