"""What goes when its time is up: the files of old jobs, and files that belong to no job."""

from __future__ import annotations

import logging

from deployments.protocol.errors import NotFound
from serve_app.jobs.store.store import JobStore
from serve_app.storage.results import ResultStore

logger = logging.getLogger(__name__)


class Retention:
    """Sweeps the results. Records go by themselves: their keys have a time to live."""

    def __init__(self, store: JobStore, results: ResultStore, result_ttl_s: float) -> None:
        self._store = store
        self._results = results
        self._result_ttl_s = result_ttl_s

    async def sweep(self) -> int:
        """Remove files whose time is up; of how many jobs. The record says so before they go."""
        due = await self._store.files_due()
        for job_id in due:
            try:
                await self._store.expire_files(job_id)
            except NotFound:  # its record went first
                logger.info("files of a forgotten job go", extra={"job_id": job_id})
            await self._results.sweep(job_id)
            await self._store.files_swept(job_id)
        return len(due)

    async def sweep_orphans(self) -> int:
        """Remove files that no record knows of; of how many jobs.

        They may be those of a call that is being accepted now, so only what is older than any job's files
        may be is touched. Files are looked at again after the records: no job is accepted with old files.
        """
        old = await self._results.jobs_older_than(self._result_ttl_s)
        orphans = await self._store.unknown(old)
        for job_id in orphans:
            logger.warning("files without a job are removed", extra={"job_id": job_id})
            await self._results.sweep(job_id)
        return len(orphans)
