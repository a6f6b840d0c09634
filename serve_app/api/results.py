"""Finished files of a job, whole or in parts."""

import re
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response

from deployments.protocol.errors import NotFound
from serve_app.api.auth import CurrentCaller
from serve_app.api.byte_ranges import RangeNotSatisfiable, requested_range
from serve_app.api.caller import CallerContext, JobId
from serve_app.api.schemas.job import EXTENSIONS, RESULT_KINDS
from serve_app.jobs.job import Job, StoredArtifact
from serve_app.jobs.service import JobService

router = APIRouter(tags=["results"])

FILE_NAME = re.compile(r"([0-9]{1,3})\.(png|jpeg|jpg|webp|mp4|webm)")
VIDEO_EXTENSIONS = ("mp4", "webm")
STILLS = ("thumbnail", "poster", "spritesheet")
FOREVER = "private, max-age=31536000, immutable"  # a finished file never changes under its address


@dataclass(frozen=True, slots=True)
class FileSelection:
    """Which file of a job, and how much of it; the last fields are the caller's headers."""

    index: int
    kind: str
    extension: str | None = None  # that the file must have
    known_etags: str | None = None  # If-None-Match
    byte_range: str | None = None
    if_range: str | None = None
    attachment: bool = False  # save it rather than show it


@router.get("/api/results/{task_id}/{name}", response_class=Response)
async def download(
    job_id: JobId,
    name: str,
    caller: CurrentCaller,
    if_none_match: Annotated[str | None, Header()] = None,
    byte_range: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header()] = None,
    attachment: Annotated[bool, Query(description="Save it rather than show it.")] = False,
) -> Response:
    """One finished image or video; `name` is as in the job's `artifacts`, such as 0.png.

    With `Range: bytes=...` only that part, so that a player can seek.
    """
    match = FILE_NAME.fullmatch(name)
    if match is None:
        raise NotFound("a picture's name is its index and format, such as 0.png", param="name")
    extension = match[2].replace("jpeg", "jpg")
    kind = "video" if extension in VIDEO_EXTENSIONS else "image"
    selection = FileSelection(int(match[1]), kind, extension, if_none_match, byte_range, if_range, attachment)
    return await result_file(caller, job_id, selection)


@router.get("/api/results/{task_id}/{index}/{still}", response_class=Response)
async def read_still(
    job_id: JobId,
    index: int,
    still: str,
    caller: CurrentCaller,
    if_none_match: Annotated[str | None, Header()] = None,
    byte_range: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header()] = None,
) -> Response:
    """The thumbnail of a finished image or video; of a video also `poster`, its first frame, and
    `spritesheet`, up to 25 of its frames in rows of 5.
    """
    if still not in STILLS:
        raise NotFound(f"there is no such picture; there is {', '.join(STILLS)}", param="name")
    selection = FileSelection(
        index, still, known_etags=if_none_match, byte_range=byte_range, if_range=if_range
    )
    return await result_file(caller, job_id, selection)


async def result_file(caller: CallerContext, job_id: str, selection: FileSelection) -> Response:
    """One file of the caller's job, as its conditional and range headers ask for it. Raises NotFound."""
    view = await caller.job_service.get(job_id, caller.owner)
    return await file_of(caller.job_service, view.job, selection)


async def file_of(jobs: JobService, job: Job, selection: FileSelection) -> Response:
    """One file of a job that the caller may read: 200, 206, 304 or 416. Raises NotFound."""
    artifact = _find(job, selection)
    headers = _headers(job.id, artifact, attachment=selection.attachment)
    if headers["ETag"] in (known.strip() for known in (selection.known_etags or "").split(",")):
        return Response(status_code=304, headers=headers)
    try:
        part = requested_range(selection.byte_range, artifact.size_bytes, headers["ETag"], selection.if_range)
    except RangeNotSatisfiable:
        headers["Content-Range"] = f"bytes */{artifact.size_bytes}"
        return Response(status_code=416, headers=headers)
    if part is not None:
        data = await jobs.artifact_part(artifact, part.start, part.end)
        headers["Content-Range"] = part.content_range
        return Response(data, 206, headers, artifact.media_type)
    stored, data = await jobs.artifact(job.id, job.owner, artifact.index, artifact.kind)
    return Response(data, headers=headers, media_type=stored.media_type)


def _find(job: Job, selection: FileSelection) -> StoredArtifact:
    index, kind = selection.index, selection.kind
    artifact = next((a for a in job.artifacts if (a.index, a.kind) == (index, kind)), None)
    if artifact is None:
        raise NotFound(
            f"job {job.id} has no {kind} {index}; it is {job.state.value} "
            f"and has {sum(a.kind == kind for a in job.artifacts)}",
            param="index",
        )
    extension = EXTENSIONS[artifact.media_type]
    if selection.extension not in (None, extension):
        raise NotFound(f"this {kind} is {index}.{extension}", param="name")
    return artifact


def _headers(job_id: str, artifact: StoredArtifact, *, attachment: bool) -> dict[str, str]:
    suffix = "" if artifact.kind in RESULT_KINDS else f"-{artifact.kind}"
    name = f"weft-{job_id}-{artifact.index}{suffix}.{EXTENSIONS[artifact.media_type]}"
    return {
        "Content-Disposition": f'{"attachment" if attachment else "inline"}; filename="{name}"',
        "Cache-Control": FOREVER,
        "ETag": f'"{artifact.sha256}"',
        "Accept-Ranges": "bytes",
    }
