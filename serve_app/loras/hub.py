"""Hub ids into addresses: which file of a Hugging Face repository is meant."""

from __future__ import annotations

import json
import re

from deployments.protocol.errors import BadRequest
from serve_app.storage.url_fetcher import FetchedFile, OnProgress, UrlFetcher

HUB = "https://huggingface.co"
HOSTS = ("huggingface.co", "*.huggingface.co", "*.hf.co")  # files live behind redirects to the latter
LISTING_BYTES = 2**20
LISTING_TIMEOUT_S = 20.0
PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
HUB_ID = re.compile(rf"({PART}/{PART})(?:@({PART}))?((?:/{PART})*)")
USUAL = "pytorch_lora_weights.safetensors"


async def fetch_from_hub(
    fetcher: UrlFetcher,
    hub_id: str,
    token: str | None,
    *,
    max_bytes: int,
    timeout_s: float,
    on_progress: OnProgress | None = None,
) -> FetchedFile:
    """The file of `owner/repo`, `owner/repo/file.safetensors` or `owner/repo@revision/...`.

    Without a file it is the repository's usual LoRA file, else its only safetensors file.
    Raises BadRequest when that does not lead to one file, and what Fetcher.get raises.
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
        file = _the_file(repo, listing.data)
    if not file.endswith(".safetensors"):
        raise BadRequest(f"{file} is no safetensors file; others are not opened", param="loras")
    return await fetcher.get(
        f"{HUB}/{repo}/resolve/{revision}/{file}",
        max_bytes=max_bytes,
        timeout_s=timeout_s,
        headers=headers,
        on_progress=on_progress,
    )


def _the_file(repo: str, listing: bytes) -> str:
    try:
        names = [str(entry["rfilename"]) for entry in json.loads(listing)["siblings"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadRequest(f"the hub's list of the files of {repo} cannot be read", param="loras") from None
    files = [name for name in names if name.endswith(".safetensors")]
    if USUAL in files:
        return USUAL
    if len(files) != 1:
        told = ", ".join(files[:5]) or "none"
        raise BadRequest(f"{repo} has no one safetensors file ({told}); name the file", param="loras")
    return files[0]
