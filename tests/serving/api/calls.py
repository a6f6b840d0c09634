"""Calls that many API tests make."""

import asyncio
from typing import Any

import httpx

from tests.patience import patience


async def ended(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    """The job once its event stream has ended."""
    async with asyncio.timeout(patience(2)):
        events = (await client.get(f"/api/generate/{job_id}/events")).text
    assert events
    job: dict[str, Any] = (await client.get(f"/api/generate/{job_id}")).json()
    return job


async def submitted(client: httpx.AsyncClient, **fields: object) -> str:
    answer = await client.post(
        "/api/generate/image", json={"model": "sketch", "prompt": "a red fox", **fields}
    )
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])
