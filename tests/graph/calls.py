"""What the tests of this folder do over HTTP."""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

from tests.graph.running import until


def submit(client: httpx.Client, **fields: Any) -> str:
    answer = client.post("/api/generate/image", json={"model": "tiny-flux-schnell", **fields})
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def ended(client: httpx.Client, job_id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        answer = client.get(f"/api/generate/{job_id}")
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job if job["status"] in ("completed", "failed", "cancelled") else None

    return until(look, f"job {job_id} ends", every_s=0.2)  # an owner may ask 20 times a second


def picture(client: httpx.Client, job: dict[str, Any], index: int = 0) -> Image.Image:
    answer = client.get(job["artifacts"][index]["url"])
    assert answer.status_code == 200
    return Image.open(io.BytesIO(answer.content)).convert("RGB")


@dataclass(frozen=True)
class Undisturbed:
    """The result of a request when no process dies, and how long it takes."""

    image: Image.Image
    seconds: float

    @classmethod
    def of(cls, client: httpx.Client, **fields: Any) -> Undisturbed:
        began = time.monotonic()
        job = ended(client, submit(client, **fields))
        return cls(picture(client, job), time.monotonic() - began)


def events_of(client: httpx.Client, job_id: str, kind: str) -> list[dict[str, Any]]:
    """Data of all events of this kind in the stream of a job that has ended."""
    answer = client.get(f"/api/generate/{job_id}/events")
    assert answer.status_code == 200
    found = []
    for block in answer.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if fields.get("event") == kind:
            found.append(json.loads(fields["data"]))
    return found
