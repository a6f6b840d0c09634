"""The files of one attempt: inputs it reads, artifacts it stores or copies, leftovers it removes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from deployments.protocol import events
from deployments.protocol.errors import WeftError
from deployments.protocol.request import ResolvedRequest
from serve_app.jobs import inputs
from serve_app.jobs.job import Job, JobState, ResumePoint, StoredArtifact
from serve_app.jobs.store.leases import Claim
from serve_app.storage.results import ResultStore, handover_path, input_path, output_path

logger = logging.getLogger(__name__)


class JobFiles:
    """Names files by job and attempt, so that attempts cannot overwrite each other's."""

    def __init__(self, claim: Claim, results: ResultStore) -> None:
        self._job = claim.job
        self._attempt = claim.attempt
        self._results = results
        self._states: list[str] = []  # paths of the resume states that this attempt has stored
        self._log_fields = {"job_id": claim.job.id, "attempt": claim.attempt}

    async def read_request(self) -> ResolvedRequest:
        """The request with its input images. Raises NotFound and OSError."""
        images = {
            name: await self._results.get(input_path(self._job.id, name))
            for name in inputs.names(self._job.request)
        }
        return inputs.attach(self._job.request, images)

    async def read_resume_state(self) -> bytes | None:
        """The state a stopped replica left of this job; None when the job starts from the beginning."""
        resume_point = self._job.resume_point
        if resume_point is None:
            return None
        try:
            return await self._results.get(resume_point.path, sha256=resume_point.sha256)
        except (WeftError, OSError):
            logger.warning("resume state is lost; the job starts from the beginning", extra=self._log_fields)
            return None

    async def store_resume_point(self, step: int, steps: int, state: bytes) -> ResumePoint | None:
        """What the next attempt starts from; None when it could not be stored."""
        path = handover_path(self._job.id, self._attempt, len(self._states))
        self._states.append(path)
        try:
            file = await self._results.put(path, state)
        except OSError:
            logger.exception(
                "resume state was not stored; the job will start from the beginning", extra=self._log_fields
            )
            return None
        return ResumePoint(file.path, file.sha256, step, steps, self._attempt)

    async def remove_states(self, keep: Iterable[ResumePoint | None]) -> None:
        """Remove the resume states of this attempt, and the one it began from, but those to `keep`."""
        claimed, kept = self._job.resume_point, {point.path for point in keep if point is not None}
        paths = [*self._states, *([] if claimed is None else [claimed.path])]
        try:
            for path in set(paths) - kept:
                await self._results.remove(path)
        except OSError:
            logger.exception("a resume state was not removed", extra=self._log_fields)

    async def store_artifact(self, artifact: events.Artifact) -> StoredArtifact:
        """The artifact, stored under this attempt. Raises OSError."""
        file = await self._results.put(
            self._output_path(artifact.index, artifact.kind, artifact.media_type), artifact.data
        )
        return StoredArtifact(
            index=artifact.index,
            kind=artifact.kind,
            path=file.path,
            media_type=artifact.media_type,
            size_bytes=file.size_bytes,
            sha256=file.sha256,
            width=artifact.width,
            height=artifact.height,
            seed=artifact.seed,
        )

    async def read(self, artifact: StoredArtifact) -> bytes:
        """The content of a stored artifact. Raises NotFound and OSError."""
        return await self._results.get(artifact.path)

    async def copy(self, artifacts: Sequence[StoredArtifact]) -> tuple[StoredArtifact, ...]:
        """Copies of another job's artifacts under this attempt. Raises NotFound and OSError."""
        return tuple([await self._copy_one(artifact) for artifact in artifacts])

    async def _copy_one(self, artifact: StoredArtifact) -> StoredArtifact:
        path = self._output_path(artifact.index, artifact.kind, artifact.media_type)
        await self._results.copy(artifact.path, path)
        return replace(artifact, path=path)

    async def remove_leftovers(self, job: Job | None) -> None:
        """Remove files that are not needed: this attempt's if it lost, all others' if it won.

        job: as this attempt left it; None: another worker has it.
        """
        try:
            if job is not None and job.state.ended:
                kept = job.artifacts if job.state is JobState.completed else ()
                await self._results.sweep(job.id, keep=[artifact.path for artifact in kept])
                return
            await self._results.discard(self._job.id, self._attempt)
            if job is None:  # the other worker may have begun from the same state
                await self.remove_states([self._job.resume_point])
            else:
                await self.remove_states([job.resume_point])
        except OSError:
            logger.exception("files of a job were not removed", extra=self._log_fields)

    def _output_path(self, index: int, kind: str, media_type: str) -> str:
        return output_path(self._job.id, self._attempt, index, kind, media_type)
