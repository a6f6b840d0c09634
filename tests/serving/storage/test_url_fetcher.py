"""The guarded fetcher against a real TLS server, and against every way round it that we know."""

from __future__ import annotations

import asyncio
import gzip
import hashlib

import pytest

from deployments.protocol.errors import BadRequest, Forbidden, TooLarge
from serve_app.storage.public_addresses import is_public
from serve_app.storage.url_fetcher import Unreachable, UrlFetcher
from tests.patience import patience
from tests.serving.remote_server import PUBLIC, RemoteServer, page, redirect

URL = "https://files.example.org/a.safetensors"
LIMITS = {"max_bytes": 1000, "timeout_s": patience()}


@pytest.fixture
def fetcher(remote: RemoteServer) -> UrlFetcher:
    return UrlFetcher(
        ["*.example.org", "cdn.example.net"],
        resolve=remote.resolve,
        network=remote,
        tls=remote.trusted,
    )


async def test_a_file_comes_with_its_digest_under_its_own_name(
    remote: RemoteServer, fetcher: UrlFetcher
) -> None:
    remote.pages["/a.safetensors"] = page(b"adapter")

    got = await fetcher.get(URL, **LIMITS)

    assert got.data == b"adapter"
    assert got.sha256 == hashlib.sha256(b"adapter").hexdigest()
    assert "Host: files.example.org\r\n" in remote.heads[0]
    assert "Accept-Encoding: identity\r\n" in remote.heads[0]
    assert remote.dialled == [PUBLIC]


async def test_progress_is_reported_with_the_total_size(remote: RemoteServer, fetcher: UrlFetcher) -> None:
    remote.pages["/a.safetensors"] = page(b"x" * 800)
    reports: list[tuple[int, int | None]] = []

    await fetcher.get(URL, **LIMITS, on_progress=lambda done, total: reports.append((done, total)))

    assert reports[-1] == (800, 800)


async def test_another_address_is_tried_when_the_first_does_not_answer(
    remote: RemoteServer, fetcher: UrlFetcher
) -> None:
    remote.pages["/a.safetensors"] = page(b"adapter")
    remote.addresses["files.example.org"] = [["2606:2800:21f:cb07:6820:80da:af6b:8b2c", PUBLIC]]

    got = await fetcher.get(URL, **LIMITS)

    assert got.data == b"adapter"
    assert remote.dialled == ["2606:2800:21f:cb07:6820:80da:af6b:8b2c", PUBLIC]


async def test_without_allowed_hosts_nothing_is_opened(remote: RemoteServer) -> None:
    fetcher = UrlFetcher([], resolve=remote.resolve, network=remote)

    with pytest.raises(Forbidden, match="opens no addresses"):
        await fetcher.get(URL, **LIMITS)

    assert remote.dialled == []


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a",
        "https://example.org/a",  # *.example.org is what lies below
        "https://evilexample.org/a",
        "https://files.example.org.evil.com/a",
    ],
)
async def test_a_host_that_is_not_allowed_is_refused(fetcher: UrlFetcher, url: str) -> None:
    with pytest.raises(Forbidden, match="not among the hosts"):
        await fetcher.get(url, **LIMITS)


@pytest.mark.parametrize(
    "url",
    [
        "http://files.example.org/a",
        "file:///etc/passwd",
        "ftp://files.example.org/a",
        "https://files.example.org:8443/a",
        "https://files.example.org:99999/a",
        "https://user@files.example.org/a",
        "https://files.example.org@10.0.0.1/a",
        "https://files.example.org\\@10.0.0.1/a",
        "https://files.example.org/a b",
        "https://files.example.org/\r\nX: y",
        "https://127.0.0.1/a",
        "https://127.1/a",
        "https://2130706433/a",
        "https://0x7f000001/a",
        "https://0177.0.0.1/a",
        "https://a.0x7f/a",
        "https://[::1]/a",
        "https://[::ffff:127.0.0.1]/a",
        "https://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460/a",
        "https://localhost/a",
        "https:///a",
        "https://" + "a" * 3000,
        "",
    ],
)
async def test_an_address_that_is_no_plain_https_name_is_refused(remote: RemoteServer, url: str) -> None:
    everywhere = UrlFetcher(["*"], resolve=remote.resolve, network=remote)

    with pytest.raises(BadRequest):
        await everywhere.get(url, **LIMITS)

    assert remote.dialled == []


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.31.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "168.63.129.16",  # Azure
        "192.0.0.192",  # Oracle
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "198.18.0.1",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "2002:a9fe:a9fe::",
        "2002:7f00:1::1",
        "2001:0:7f00:1::",  # Teredo
        "2001:0:5db8:d822:0:0:8000:fffe",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",  # AWS
        "ff02::1",
        "2001:db8::1",
        "nonsense",
    ],
)
async def test_a_name_that_leads_into_our_own_network_is_refused(
    remote: RemoteServer, fetcher: UrlFetcher, address: str
) -> None:
    remote.addresses["files.example.org"] = [[PUBLIC, address]]

    with pytest.raises(Forbidden, match="not public"):
        await fetcher.get(URL, **LIMITS)

    assert remote.dialled == []


@pytest.mark.parametrize(
    "address", [PUBLIC, "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


async def test_what_dns_says_later_does_not_matter(remote: RemoteServer, fetcher: UrlFetcher) -> None:
    remote.pages["/a.safetensors"] = page(b"adapter")
    remote.addresses["files.example.org"] = [[PUBLIC], ["127.0.0.1"]]

    first = await fetcher.get(URL, **LIMITS)

    assert first.data == b"adapter"
    assert remote.dialled == [PUBLIC]
    with pytest.raises(Forbidden, match="not public"):
        await fetcher.get(URL, **LIMITS)


async def test_a_redirect_is_followed_and_its_target_is_checked(
    remote: RemoteServer, fetcher: UrlFetcher
) -> None:
    remote.pages["/a.safetensors"] = redirect("https://cdn.example.net/b")
    remote.pages["/b"] = redirect("/c")
    remote.pages["/c"] = page(b"adapter")

    got = await fetcher.get(URL, **LIMITS)

    assert got.url == "https://cdn.example.net/c"
    assert got.data == b"adapter"


@pytest.mark.parametrize(
    "where",
    [
        "http://169.254.169.254/latest/meta-data/",
        "https://169.254.169.254/",
        "https://[::ffff:169.254.169.254]/",
        "http://files.example.org/a",
        "file:///etc/passwd",
        "//127.0.0.1/",
        "https://elsewhere.com/a",
        "https://other.example.org/a",  # which DNS sends inside
    ],
)
async def test_a_redirect_out_of_bounds_is_not_followed(
    remote: RemoteServer, fetcher: UrlFetcher, where: str
) -> None:
    remote.pages["/a.safetensors"] = redirect(where)
    remote.addresses["other.example.org"] = [["169.254.169.254"]]

    with pytest.raises((BadRequest, Forbidden)):
        await fetcher.get(URL, **LIMITS)

    assert remote.dialled == [PUBLIC]


async def test_redirects_end_after_three(remote: RemoteServer, fetcher: UrlFetcher) -> None:
    remote.pages["/a.safetensors"] = redirect("/a.safetensors", status="307 Temporary Redirect")

    with pytest.raises(BadRequest, match="more than 3"):
        await fetcher.get(URL, **LIMITS)

    assert len(remote.heads) == 4


async def test_a_token_stays_with_the_host_it_is_for(remote: RemoteServer, fetcher: UrlFetcher) -> None:
    remote.pages["/a.safetensors"] = redirect("https://cdn.example.net/b")
    remote.pages["/b"] = page(b"adapter")

    await fetcher.get(URL, **LIMITS, headers={"Authorization": "Bearer secret"})

    assert "Bearer secret" in remote.heads[0]
    assert "secret" not in remote.heads[1]


async def test_a_file_over_the_limit_is_refused_by_its_head(
    remote: RemoteServer, fetcher: UrlFetcher
) -> None:
    remote.pages["/a.safetensors"] = page(b"x" * 1001)

    with pytest.raises(TooLarge, match="1000 bytes"):
        await fetcher.get(URL, **LIMITS)


async def test_a_file_of_unknown_length_is_cut_off_at_the_limit(
    remote: RemoteServer, fetcher: UrlFetcher
) -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"64\r\n" + b"x" * 100 + b"\r\n")
            await writer.drain()

    remote.pages["/a.safetensors"] = endless

    with pytest.raises(TooLarge):
        await fetcher.get(URL, **LIMITS)


async def test_a_slow_drip_ends_at_the_deadline(remote: RemoteServer, fetcher: UrlFetcher) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    remote.pages["/a.safetensors"] = drip

    with pytest.raises(Unreachable, match=r"within 0\.5 s"):
        await fetcher.get(URL, max_bytes=1000, timeout_s=0.5)


async def test_a_compressed_body_is_refused_unread(remote: RemoteServer, fetcher: UrlFetcher) -> None:
    bomb = gzip.compress(bytes(100_000))
    remote.pages["/a.safetensors"] = page(bomb, "Content-Encoding: gzip")

    with pytest.raises(BadRequest, match="compressed"):
        await fetcher.get(URL, **LIMITS)


async def test_a_file_that_breaks_off_is_not_taken_for_whole(
    remote: RemoteServer, fetcher: UrlFetcher
) -> None:
    async def half(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")

    remote.pages["/a.safetensors"] = half

    with pytest.raises(Unreachable):
        await fetcher.get(URL, **LIMITS)


async def test_a_missing_file_says_so(remote: RemoteServer, fetcher: UrlFetcher) -> None:
    remote.pages["/a.safetensors"] = page(b"", status="404 Not Found")

    with pytest.raises(BadRequest, match="answers 404"):
        await fetcher.get(URL, **LIMITS)


async def test_a_server_that_is_not_who_it_says_is_not_talked_to(remote: RemoteServer) -> None:
    remote.pages["/a.safetensors"] = page(b"adapter")
    strict = UrlFetcher(["*"], resolve=remote.resolve, network=remote)  # knows only the usual authorities

    with pytest.raises(Unreachable):
        await strict.get(URL, **LIMITS)

    assert remote.heads == []


async def test_a_post_returns_the_status_and_follows_no_redirect(
    remote: RemoteServer, fetcher: UrlFetcher
) -> None:
    remote.pages["/hook"] = redirect("https://files.example.org/else", status="307 Temporary Redirect")

    status = await fetcher.post(
        "https://files.example.org/hook", b"{}", {"webhook-id": "1"}, timeout_s=patience()
    )

    assert status == 307
    assert remote.bodies == [b"{}"]
    assert "webhook-id: 1\r\n" in remote.heads[0]
    assert len(remote.heads) == 1


async def test_a_post_into_our_own_network_is_refused(remote: RemoteServer, fetcher: UrlFetcher) -> None:
    remote.addresses["files.example.org"] = [["::ffff:127.0.0.1"]]

    with pytest.raises(Forbidden, match="not public"):
        await fetcher.post("https://files.example.org/hook", b"{}", {})

    assert remote.dialled == []
