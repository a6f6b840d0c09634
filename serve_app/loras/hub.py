"""LoRA files of Hugging Face repositories, by hub id."""

from __future__ import annotations

import json
import re

from deployments.protocol.errors import BadRequest
from serve_app.storage.url_fetcher import UrlFetcher, Write

HUB = "https://huggingface.co"
HOSTS = ("huggingface.co", "*.huggingface.co", "*.hf.co")  # the hub redirects downloads to the latter
LISTING_BYTES = 2**20
LISTING_TIMEOUT_S = 20.0
PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
HUB_ID = re.compile(rf"({PART}/{PART})(?:@({PART}))?((?:/{PART})*)")
DEFAULT_FILE = "pytorch_lora_weights.safetensors"


async def download_from_hub(
    fetcher: UrlFetcher,
    hub_id: str,
    token: str | None,
    write: Write,
    *,
    max_bytes: int,
    timeout_s: float,
) -> str:
    """The SHA-256 (hex) of a file, whose bytes go to `write`.

    hub_id: `owner/repo`, `owner/repo/file.safetensors` or `owner/repo@revision/...`. Without a file name:
    DEFAULT_FILE (the name that diffusers saves under), else the only safetensors file.
    token: of a Hugging Face account; None: no login. max_bytes: of the file.
    Raises BadRequest for an id that is not one file, and what UrlFetcher.download raises.
    """
    match = HUB_ID.fullmatch(hub_id)
    if match is None or ".." in hub_id:
        raise BadRequest("a hub id is owner/repo, or owner/repo/file.safetensors", param="loras")
    repo, revision, file = match[1], match[2] or "main", match[3].lstrip("/")
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    if not file:
        listing = await fetcher.get(
            f"{HUB}/api/models/{repo}/revision/{revision}",
            max_bytes=LISTING_BYTES,
            timeout_s=LISTING_TIMEOUT_S,
            headers=headers,
        )
        file = _file_name(repo, listing.data)
    if not file.endswith(".safetensors"):
        raise BadRequest(f"{file} is no safetensors file; others are not opened", param="loras")
    return await fetcher.download(
        f"{HUB}/{repo}/resolve/{revision}/{file}",
        write,
        max_bytes=max_bytes,
        timeout_s=timeout_s,
        headers=headers,
    )


def _file_name(repo: str, listing: bytes) -> str:
    try:
        names = [str(entry["rfilename"]) for entry in json.loads(listing)["siblings"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadRequest(f"the hub's list of the files of {repo} cannot be read", param="loras") from None
    files = [name for name in names if name.endswith(".safetensors")]
    if DEFAULT_FILE in files:
        return DEFAULT_FILE
    if len(files) != 1:
        found = ", ".join(files[:5]) or "none"
        raise BadRequest(f"{repo} has no one safetensors file ({found}); name the file", param="loras")
    return files[0]
