"""Which LoRAs the unfinished jobs need: their files must not be removed."""

from __future__ import annotations

from redis.asyncio import Redis

from deployments.protocol.request import ResolvedRequest
from serve_app.jobs.store.key_names import Keys
from serve_app.redis.transactions import redis_errors


async def referenced_loras(redis: Redis, prefix: str) -> set[str]:
    """Digests of the LoRAs of all queued and running jobs. Raises StoreUnreachable."""
    keys = Keys(prefix)
    with redis_errors():
        async with redis.pipeline(transaction=True) as pipe:  # a job that is just claimed is in one of them
            pipe.zrange(keys.pending, 0, -1)
            pipe.zrange(keys.running, 0, -1)
            waiting, running = await pipe.execute()
        async with redis.pipeline(transaction=False) as pipe:
            for job_id in {*waiting, *running}:
                pipe.hget(keys.job(job_id), "request")
            requests = [text for text in await pipe.execute() if text is not None]
    return {lora.id for text in requests for lora in ResolvedRequest.model_validate_json(text).loras}
