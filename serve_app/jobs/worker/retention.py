"""Removes files whose time is over: those of old jobs, and those without a record."""

from __future__ import annotations

import logging

from deployments.protocol.errors import NotFound
from serve_app.jobs.store.file_expiry import FileExpiry
from serve_app.storage.results import ResultStore

logger = logging.getLogger(__name__)


class Retention:
    """Sweeps the results. Records need no sweeping: their keys have a time to live."""

    def __init__(self, expiry: FileExpiry, results: ResultStore, result_ttl_s: float) -> None:
        self._expiry = expiry
        self._results = results
        self._result_ttl_s = result_ttl_s

    async def sweep(self) -> int:
        """Remove expired files and return of how many jobs. The record is updated before they go."""
        due = await self._expiry.due()
        for job_id in due:
            try:
                await self._expiry.expire(job_id)
            except NotFound:  # its record expired first
                logger.info("files of a deleted job are removed", extra={"job_id": job_id})
            await self._results.sweep(job_id)
            await self._expiry.done(job_id)
        return len(due)

    async def sweep_orphans(self) -> int:
        """Remove files that have no record and return of how many jobs.

        They may belong to a job that is being accepted now, so only files older than any job's may be are
        removed. Files are listed before records are read: no job is accepted with old files.
        """
        old = await self._results.jobs_older_than(self._result_ttl_s)
        orphans = await self._expiry.without_record(old)
        for job_id in orphans:
            logger.warning("files without a job are removed", extra={"job_id": job_id})
            await self._results.sweep(job_id)
        return len(orphans)
