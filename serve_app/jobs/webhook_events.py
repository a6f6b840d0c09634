"""The webhook of a job's ending: its body, and its signature after standardwebhooks.com (pure)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from datetime import datetime

from standardwebhooks import Webhook

from serve_app.jobs.job import Job


def owner_secret(secret: bytes, owner: str) -> str:
    """The key of an owner's webhooks: whsec_ and base64, the form that receivers' libraries take."""
    key = hmac.new(secret, b"webhook:" + owner.encode(), hashlib.sha256).digest()
    return "whsec_" + base64.b64encode(key).decode()


def signature_headers(secret: str, event_id: str, sent_at: datetime, body: bytes) -> dict[str, str]:
    """Headers that prove who sent this body, and when. secret: as owner_secret returns it."""
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(int(sent_at.timestamp())),
        "webhook-signature": Webhook(secret).sign(event_id, sent_at, body.decode()),
        "content-type": "application/json",
    }


def event_body(job: Job, event_id: str) -> bytes:
    """JSON in OpenAI's event envelope: id, state, times and artifacts of the job. No prompt, no image."""
    kind = "image" if job.request.video is None else "video"
    data: dict[str, object] = {
        "id": job.id,
        "status": job.state.value,
        "model": job.request.model,
        "created_at": job.created_at,
        "completed_at": job.completed_at,
        "artifacts": [
            {"index": a.index, "kind": a.kind, "media_type": a.media_type, "sha256": a.sha256}
            for a in job.artifacts
        ],
        "error": None if job.error is None else {"kind": job.error.kind, "message": job.error.message},
    }
    event = {
        "id": event_id,
        "object": "event",
        "created_at": int(job.completed_at or 0),
        "type": f"{kind}.{job.state.value}",
        "data": data,
    }
    return json.dumps(event, separators=(",", ":")).encode()
