"""What this dialect remembers of a caller between its calls: options, and the jobs of its latest calls.

A1111 has one user; here every owner has options and jobs of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Sequence
from typing import Any, cast

from serve_app.api.caller import CallerContext
from serve_app.jobs.job import Job
from serve_app.redis.transactions import redis_errors

KEPT_S = 30 * 86_400
MAX_JOBS = 64  # of the latest calls: more than one call can have
DEFAULTS: dict[str, Any] = {  # options that clients read, change and post back
    "sd_model_checkpoint": "",
    "sd_checkpoint_hash": "",
    "sd_vae": "Automatic",
    "sd_lora": "None",
    "CLIP_stop_at_last_layers": 1,
    "samples_format": "png",
    "eta_noise_seed_delta": 0,
    "show_progress_every_n_steps": 1,
    "live_previews_enable": True,
}


async def options(caller: CallerContext) -> dict[str, Any]:
    """The caller's options; sd_model_checkpoint is empty while it has chosen none."""
    redis = caller.state.accounts
    if redis is None:
        return dict(DEFAULTS)
    with redis_errors():
        text = await redis.get(_key(caller, "options"))
    return DEFAULTS | (json.loads(text) if text else {})


async def set_options(caller: CallerContext, changed: dict[str, Any]) -> None:
    """Keep these options of the caller; those that DEFAULTS does not have are ignored."""
    redis = caller.state.accounts
    if redis is None:
        return
    known = {
        name: value
        for name, value in changed.items()
        if name in DEFAULTS and isinstance(value, type(DEFAULTS[name])) and len(str(value)) <= 200
    }
    kept = await options(caller) | known
    with redis_errors():
        await redis.set(_key(caller, "options"), json.dumps(kept), ex=KEPT_S)


async def remember_jobs(caller: CallerContext, jobs: Sequence[Job], task: str | None = None) -> None:
    """The newest jobs of the caller in this dialect. task: the name that the client gave the call."""
    redis = caller.state.accounts
    if redis is None or not jobs:
        return
    key = _key(caller, "jobs")
    entries = [json.dumps([job.id, task]) for job in jobs]
    with redis_errors():
        async with redis.pipeline(transaction=True) as pipe:
            pipe.rpush(key, *entries)
            pipe.ltrim(key, -MAX_JOBS, -1)
            pipe.expire(key, KEPT_S)
            await pipe.execute()


async def recent_jobs(caller: CallerContext, task: str | None = None) -> list[str]:
    """Ids of the caller's latest jobs in this dialect, the oldest first; task: of the call of this name."""
    redis = caller.state.accounts
    if redis is None:
        return []
    with redis_errors():
        entries = await cast(Awaitable[list[str]], redis.lrange(_key(caller, "jobs"), 0, -1))
    found = [json.loads(entry) for entry in entries]
    return [job_id for job_id, name in found if task in (None, name)]


def _key(caller: CallerContext, kind: str) -> str:
    owner = hashlib.sha256(caller.owner.encode()).hexdigest()[:32]
    return f"{caller.state.settings.redis_prefix}a1111:{kind}:{owner}"
