"""What transactions read before they decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from redis.asyncio.client import Pipeline

from deployments.protocol.errors import NotFound
from serve_app.jobs.job import Job
from serve_app.jobs.store.endings import NO_GROUP, CoalescedGroup
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.record import job_from
from serve_app.redis.transactions import get_hash

NO_SUCH_JOB = "no such job; it may have been deleted or forgotten, or it is not yours"


def existing_job(job_id: str, fields: Mapping[str, str]) -> Job:
    """The job in a hash. Raises NotFound for an empty one."""
    if not fields:
        raise NotFound(NO_SUCH_JOB)
    return job_from(job_id, fields)


async def read_job(pipe: Pipeline, keys: Keys, job_id: str) -> Job:
    """The job as it is stored. Raises NotFound."""
    return existing_job(job_id, await get_hash(pipe, keys.job(job_id)))


async def read_group(pipe: Pipeline, keys: Keys, job: Job) -> CoalescedGroup:
    """The jobs that wait for this job's files; everything it depends on is watched."""
    if job.cache_key is None:
        return NO_GROUP
    await pipe.watch(keys.cache_key(job.cache_key), keys.followers(job.id))
    is_leader = await pipe.get(keys.cache_key(job.cache_key)) == job.id
    ids = cast(list[str], await pipe.zrange(keys.followers(job.id), 0, -1))
    if ids:
        await pipe.watch(*(keys.job(follower) for follower in ids))
    followers = [await read_job(pipe, keys, follower) for follower in ids]
    return CoalescedGroup(is_leader, tuple(followers))
