"""An owner's jobs, newest first, page by page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from redis.asyncio import Redis

from deployments.protocol.errors import BadRequest
from serve_app.job_ids import JOB_ID_PATTERN
from serve_app.jobs.job import Job, JobState
from serve_app.jobs.store.key_names import Keys
from serve_app.jobs.store.record import job_from

CHUNK = 100  # index entries read at once
CHUNKS = 10  # at most, per page: a rare filter is answered with a short page and a cursor

Edge = tuple[int, str]  # (time of acceptance in us, job id): where a page ended


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs of an owner are listed; None: any."""

    state: JobState | None = None
    model: str | None = None
    kind: Literal["image", "video"] | None = None
    text: str | None = None  # in the prompt, whatever its case

    def admits(self, job: Job) -> bool:
        request = job.request
        return (
            self.state in (None, job.state)
            and self.model in (None, request.model)
            and self.kind in (None, "image" if request.video is None else "video")
            and (self.text is None or self.text.casefold() in request.prompt.casefold())
        )


ALL_JOBS = JobFilter()


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some jobs, newest first, and the cursor of the next page (None: this is the last one)."""

    jobs: tuple[Job, ...]
    next_cursor: str | None


class OwnerIndex:
    """The sorted set of one owner's jobs. Reading removes the entries of deleted jobs."""

    def __init__(self, redis: Redis, keys: Keys, owner: str) -> None:
        self._redis = redis
        self._keys = keys
        self._key = keys.owner(owner)

    async def page(self, *, cursor: str | None, limit: int, where: JobFilter) -> JobPage:
        """At most `limit` jobs older than the cursor that the filter admits."""
        edge = _parse(cursor)
        found: list[Job] = []
        for _ in range(CHUNKS):
            entries = await self._older(edge)
            for entry, job in await self._read(entries):
                if where.admits(job):
                    if len(found) == limit:
                        assert edge is not None, "a full page has a last job"
                        return JobPage(tuple(found), f"{edge[0]}-{edge[1]}")
                    found.append(job)
                    edge = entry
            if len(entries) < CHUNK:
                return JobPage(tuple(found), None)
            if len(found) < limit:
                edge = entries[-1]
        assert edge is not None, "a full chunk has a last entry"
        return JobPage(tuple(found), f"{edge[0]}-{edge[1]}")

    async def _older(self, edge: Edge | None) -> list[Edge]:
        """Up to CHUNK entries beyond the edge; entries of the same microsecond are ordered by id."""
        newest = "+inf" if edge is None else str(edge[0])
        raw = await self._redis.zrange(
            self._key, newest, "-inf", desc=True, byscore=True, offset=0, num=CHUNK + 1, withscores=True
        )
        pairs = cast(list[tuple[str, float]], raw)
        entries = [(int(score), job_id) for job_id, score in pairs]
        return [entry for entry in entries if edge is None or entry < edge][:CHUNK]

    async def _read(self, entries: list[Edge]) -> list[tuple[Edge, Job]]:
        """The jobs of these entries. A missing hash was deleted for good: ids are never reused."""
        if not entries:
            return []
        async with self._redis.pipeline(transaction=False) as pipe:
            for _, job_id in entries:
                pipe.hgetall(self._keys.job(job_id))
            hashes = await pipe.execute()
        deleted = [job_id for (_, job_id), fields in zip(entries, hashes, strict=True) if not fields]
        if deleted:
            await self._redis.zrem(self._key, *deleted)
        return [
            (entry, job_from(entry[1], fields))
            for entry, fields in zip(entries, hashes, strict=True)
            if fields
        ]


def _parse(cursor: str | None) -> Edge | None:
    if cursor is None:
        return None
    match = re.fullmatch(rf"(\d{{1,17}})-({JOB_ID_PATTERN})", cursor)
    if match is None:
        raise BadRequest("cursor is not one that a list returned; leave it out to start", param="cursor")
    return int(match[1]), match[2]
