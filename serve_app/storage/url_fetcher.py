"""Opens URLs that callers supply, without access to private networks (SSRF). No other module opens such URLs.

A host name is resolved once, every address is checked, and a checked address is connected to, while Host and
TLS keep the name: a later DNS answer has no effect. Redirects are checked in the same way.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import httpcore
import httpx

from deployments.protocol.errors import BadRequest, Forbidden, Overloaded, TooLarge
from serve_app.storage.public_addresses import is_public

T = TypeVar("T")

MAX_URL_CHARS = 2048
MAX_REDIRECTS = 3
CONNECT_TIMEOUT_S = 10.0
STALL_S = 15.0  # without a single byte
SLOW_AFTER_S = 20.0  # from then on a file must have come at MIN_BYTES_PER_S at least
MIN_BYTES_PER_S = 64 * 2**10
REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"https": 443, "http": 80}
HOST = re.compile(r"(?=.{1,253}\Z)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z][a-z0-9-]{0,61}[a-z0-9]")
PATTERN = re.compile(r"\*|(\*\.)?[a-z0-9_.-]+")

Resolve = Callable[[str, int], Awaitable[list[str]]]  # (host, port) -> every address it has
Write = Callable[[bytes], Awaitable[object]]
OnProgress = Callable[[int, int | None], object]  # (bytes received, bytes in all if they are known)


class Unreachable(Overloaded):
    """The remote server does not answer in time; it may later."""


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """A complete file."""

    data: bytes
    sha256: str
    url: str  # after redirects


@dataclass(frozen=True, slots=True)
class _Address:
    """A checked URL."""

    scheme: str
    host: str
    target: str  # path and query

    @property
    def port(self) -> int:
        return PORTS[self.scheme]

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}{self.target}"


class UrlFetcher:
    """Opens URLs of allowed hosts only.

    hosts: `example.org`, `*.example.org` (subdomains), or `*` (every public host); none: no URL is opened.
    plain_http: allow http on port 80 as well.  resolve, network, tls: replaced by tests.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        *,
        plain_http: bool = False,
        resolve: Resolve | None = None,
        network: httpcore.AsyncNetworkBackend | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._hosts = tuple(host.strip().lower().rstrip(".") for host in hosts)
        for pattern in self._hosts:
            if not PATTERN.fullmatch(pattern):
                raise BadRequest(f"{pattern!r} is no host; write example.org, *.example.org or *")
        self._plain_http = plain_http
        self._resolve = resolve or _resolve
        self._network = network or httpcore.AnyIOBackend()
        self._tls = tls

    @property
    def enabled(self) -> bool:
        return bool(self._hosts)

    def check(self, url: str) -> str:
        """The URL in the form that is opened. Raises BadRequest or Forbidden naming the rule it violates."""
        return self._address(url).url

    async def get(
        self,
        url: str,
        *,
        max_bytes: int,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        on_progress: OnProgress | None = None,
    ) -> FetchedFile:
        """The file at the URL, after at most 3 redirects. `Authorization` is sent to the first host only.

        Raises BadRequest or Forbidden for a URL that is not allowed or a missing file, TooLarge above
        max_bytes, Unreachable after timeout_s (in total) or when the connection fails.
        """
        data = bytearray()

        async def append(chunk: bytes) -> None:
            data.extend(chunk)

        address, sha256 = await self._fetch(url, append, max_bytes, timeout_s, headers, on_progress)
        return FetchedFile(bytes(data), sha256, address.url)

    async def download(
        self,
        url: str,
        write: Write,
        *,
        max_bytes: int,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """The SHA-256 (hex) of the file at the URL, whose bytes go to `write` as they come.

        Raises as `get` does, and Unreachable for a file that comes slower than MIN_BYTES_PER_S.
        """
        return (await self._fetch(url, write, max_bytes, timeout_s, headers, _check_speed()))[1]

    async def _fetch(
        self,
        url: str,
        write: Write,
        max_bytes: int,
        timeout_s: float,
        headers: Mapping[str, str] | None,
        on_progress: OnProgress | None,
    ) -> tuple[_Address, str]:
        first = self._address(url)
        work = self._get(first, write, max_bytes, dict(headers or {}), on_progress)
        return await _in_time(work, timeout_s, first)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float = 5.0) -> int:
        """The status of the answer, whose body is not read. Redirects are not followed.

        Raises BadRequest or Forbidden for a URL that is not allowed, Unreachable.
        """
        address = self._address(url)
        return await _in_time(self._post(address, body, dict(headers)), timeout_s, address)

    async def _get(
        self,
        address: _Address,
        write: Write,
        max_bytes: int,
        headers: dict[str, str],
        on_progress: OnProgress | None,
    ) -> tuple[_Address, str]:
        first = address
        for _ in range(MAX_REDIRECTS + 1):
            private = {} if address.host == first.host else {"authorization", "cookie"}
            sent = {name: value for name, value in headers.items() if name.lower() not in private}
            async with self._call("GET", address, sent) as response:
                if response.status not in REDIRECTS:
                    return address, await _read(response, address, write, max_bytes, on_progress)
                where = _header(response, b"location")
            address = self._address(urljoin(address.url, where))
        raise BadRequest(f"{first.host} redirects more than {MAX_REDIRECTS} times; send the final address")

    async def _post(self, address: _Address, body: bytes, headers: dict[str, str]) -> int:
        async with self._call("POST", address, headers, body) as response:
            return response.status

    @asynccontextmanager
    async def _call(
        self, method: str, address: _Address, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncIterator[httpcore.Response]:
        """One request on a connection of its own to a checked address."""
        if self._tls is None:
            self._tls = httpx.create_ssl_context()
        guard = _CheckedNetwork(self._network, await self._checked(address))
        sent = {"User-Agent": "weft", "Accept-Encoding": "identity", **headers}
        async with httpcore.AsyncConnectionPool(self._tls, network_backend=guard) as pool:
            url = httpcore.URL(
                scheme=address.scheme.encode(),
                host=address.host.encode(),
                port=address.port,
                target=address.target.encode(),
            )
            timeouts = {"connect": CONNECT_TIMEOUT_S, "read": STALL_S, "write": STALL_S}
            async with pool.stream(
                method, url, headers=list(sent.items()), content=body, extensions={"timeout": timeouts}
            ) as response:
                yield response

    def _address(self, url: str) -> _Address:
        if not self.enabled:
            raise Forbidden("this service opens no addresses; its operator may allow hosts")
        if len(url) > MAX_URL_CHARS or not url.isprintable() or re.search(r"[\s\\]", url):
            raise BadRequest(
                f"the address is no URL: at most {MAX_URL_CHARS} characters, no spaces or backslashes"
            )
        try:
            parts = urlsplit(url)
            name, port = parts.hostname or "", parts.port
        except ValueError:
            raise BadRequest("the address is no URL; send https://host/path") from None
        if parts.scheme not in (PORTS if self._plain_http else ("https",)):
            raise BadRequest("the address must begin with https://")
        if parts.username is not None or parts.password is not None:
            raise BadRequest("the address must not hold a user name or password")
        host = _host(name)
        if port not in (None, PORTS[parts.scheme]):
            raise BadRequest(f"the address must use port {PORTS[parts.scheme]}")
        if not any(_matches(host, pattern) for pattern in self._hosts):
            raise Forbidden(f"{host} is not among the hosts that this service may open")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        quoted = httpx.URL(target).raw_path.decode("ascii")  # percent-encodes what is not ASCII
        return _Address(parts.scheme, host, quoted)

    async def _checked(self, address: _Address) -> list[str]:
        """The addresses of the host. Raises Forbidden unless all of them are public."""
        try:
            found = await self._resolve(address.host, address.port)
        except OSError as error:
            raise BadRequest(f"there is no host {address.host}") from error
        if not found:
            raise BadRequest(f"there is no host {address.host}")
        if not all(is_public(ip) for ip in found):
            raise Forbidden(f"{address.host} resolves to an address that is not public; it is not opened")
        return found


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to the checked addresses instead of the host of a request."""

    def __init__(self, network: httpcore.AsyncNetworkBackend, addresses: list[str]) -> None:
        self._network = network
        self._addresses = addresses

    async def connect_tcp(
        self,
        host: str,  # noqa: ARG002  the signature is that of the base class
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,  # noqa: ARG002
    ) -> httpcore.AsyncNetworkStream:
        *others, last = self._addresses
        for address in others:
            try:
                return await self._network.connect_tcp(address, port, timeout=timeout)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._network.connect_tcp(last, port, timeout=timeout)


def _host(name: str) -> str:
    """The host name in ASCII. Raises BadRequest for literal addresses in any spelling."""
    try:
        host = name.encode("idna").decode("ascii").lower().rstrip(".")
    except UnicodeError:
        raise BadRequest("the address has no valid host name") from None
    if not HOST.fullmatch(host):  # the last label begins with a letter: 127.1, 0x7f.1 and [::1] do not
        raise BadRequest("the address needs a full host name, such as example.org; numbers are not opened")
    return host


def _matches(host: str, pattern: str) -> bool:
    if pattern == "*":
        return True
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern


async def _resolve(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def _read(
    response: httpcore.Response,
    address: _Address,
    write: Write,
    max_bytes: int,
    on_progress: OnProgress | None,
) -> str:
    """The SHA-256 (hex) of the body, which goes to `write`.

    Raises before reading it when the status or a header already forbids it.
    """
    if response.status != 200:
        raise BadRequest(f"{address.host} answers {response.status}; check the address and who may read it")
    if _header(response, b"content-encoding").lower() not in ("", "identity"):
        raise BadRequest(f"{address.host} sends a compressed body, though an uncompressed one was requested")
    stated = _header(response, b"content-length")
    total = int(stated) if stated.isdigit() else None
    too_large = TooLarge(f"the file of {address.host} is over the limit of {max_bytes} bytes")
    if total is not None and total > max_bytes:
        raise too_large
    received, sha256 = 0, hashlib.sha256()
    async for chunk in response.aiter_stream():
        received += len(chunk)
        if received > max_bytes:
            raise too_large
        sha256.update(chunk)
        await write(chunk)
        if on_progress is not None:
            on_progress(received, total)
    return sha256.hexdigest()


def _check_speed() -> OnProgress:
    """Raises Unreachable once a file comes too slowly: it would hold its place for a long time."""
    began = time.monotonic()

    def check(received: int, _total: int | None) -> None:
        elapsed_s = time.monotonic() - began
        if elapsed_s > SLOW_AFTER_S and received < MIN_BYTES_PER_S * elapsed_s:
            raise Unreachable(
                f"the file came at {received / elapsed_s / 1024:.0f} KiB/s; at least "
                f"{MIN_BYTES_PER_S // 1024} KiB/s are needed: use a faster host, or upload it"
            )

    return check


def _header(response: httpcore.Response, name: bytes) -> str:
    return next((v.decode("latin-1") for key, v in response.headers if key.lower() == name), "")


async def _in_time(work: Awaitable[T], timeout_s: float, address: _Address) -> T:
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise Unreachable(f"{address.host} did not finish within {timeout_s:g} s; try again later") from None
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
        reason = type(error).__name__
        raise Unreachable(f"the connection to {address.host} failed ({reason}); try again later") from error
