"""Hub ids: which file they mean, asked of a server that stands in for the hub."""

from __future__ import annotations

import json

import pytest

from deployments.protocol.errors import BadRequest
from serve_app.loras.hub import HOSTS, download_from_hub
from serve_app.storage.url_fetcher import UrlFetcher
from tests.patience import patience
from tests.serving.remote_server import RemoteServer, page, redirect

LIMITS = {"max_bytes": 1000, "timeout_s": patience()}


@pytest.fixture
def hub(remote: RemoteServer) -> UrlFetcher:
    return UrlFetcher(HOSTS, resolve=remote.resolve, network=remote, tls=remote.trusted)


async def downloaded(hub: UrlFetcher, hub_id: str, token: str | None = None) -> bytes:
    data = bytearray()

    async def write(chunk: bytes) -> None:
        data.extend(chunk)

    await download_from_hub(hub, hub_id, token, write, **LIMITS)
    return bytes(data)


def listing(*names: str) -> bytes:
    return json.dumps({"siblings": [{"rfilename": name} for name in names]}).encode()


async def test_a_file_of_a_repository_comes_through_the_hubs_redirect(
    remote: RemoteServer, hub: UrlFetcher
) -> None:
    remote.pages["/ada/ink/resolve/v2/sub/a.safetensors"] = redirect("https://cdn-lfs.hf.co/blob?sig=1")
    remote.pages["/blob?sig=1"] = page(b"adapter")

    got = await downloaded(hub, "ada/ink@v2/sub/a.safetensors", "hf_secret")

    assert got == b"adapter"
    assert "Bearer hf_secret" in remote.heads[0]
    assert "hf_secret" not in remote.heads[1]


@pytest.mark.parametrize(
    "names",
    [
        ("README.md", "ink.safetensors"),
        ("ink.safetensors", "x.safetensors", "pytorch_lora_weights.safetensors"),
    ],
)
async def test_without_a_file_name_the_default_or_only_file_is_fetched(
    remote: RemoteServer, hub: UrlFetcher, names: tuple[str, ...]
) -> None:
    remote.pages["/api/models/ada/ink/revision/main"] = page(listing(*names))
    remote.pages[f"/ada/ink/resolve/main/{names[-1]}"] = page(b"adapter")

    got = await downloaded(hub, "ada/ink")

    assert got == b"adapter"
    assert "authorization" not in remote.heads[0].lower()


@pytest.mark.parametrize(
    "body", [listing("a.safetensors", "b.safetensors"), listing("a.bin"), b"<html>", b"[]", b"{}"]
)
async def test_a_repository_without_one_obvious_file_is_refused(
    remote: RemoteServer, hub: UrlFetcher, body: bytes
) -> None:
    remote.pages["/api/models/ada/ink/revision/main"] = page(body)

    with pytest.raises(BadRequest):
        await downloaded(hub, "ada/ink")


@pytest.mark.parametrize(
    "hub_id",
    [
        "ink",
        "ada/../x",
        "ada/ink/../../x",
        "https://a/b",
        "ada/ink/a.bin",
        "ada/ink?x=1",
        "ada/ink/a.safetensors#x",
        "",
    ],
)
async def test_an_invalid_id_is_refused_before_any_call(
    remote: RemoteServer, hub: UrlFetcher, hub_id: str
) -> None:
    with pytest.raises(BadRequest):
        await downloaded(hub, hub_id)

    assert remote.dialled == []
