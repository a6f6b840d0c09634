"""Finished pictures as files."""

import re
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response

from deployments.protocol.errors import NotFound
from serve_app.api.depends import Here, JobId, Visit
from serve_app.api.schemas.job import EXTENSIONS
from serve_app.jobs.job import StoredArtifact

router = APIRouter(tags=["results"])

FILE_NAME = re.compile(r"([0-9]{1,3})\.(png|jpeg|jpg|webp)")
FOREVER = "private, max-age=31536000, immutable"  # a finished picture never changes under its address


@router.get("/api/results/{task_id}/{name}", response_class=Response)
async def download(
    job_id: JobId,
    name: str,
    visit: Here,
    if_none_match: Annotated[str | None, Header()] = None,
    attachment: Annotated[bool, Query(description="Save it rather than show it.")] = False,
) -> Response:
    """One finished picture; `name` is as in the job's `artifacts`, such as 0.png."""
    match = FILE_NAME.fullmatch(name)
    if match is None:
        raise NotFound("a picture's name is its index and format, such as 0.png", param="name")
    extension = match[2].replace("jpeg", "jpg")
    return await _file(visit, job_id, int(match[1]), "image", extension, if_none_match, attachment)


@router.get("/api/results/{task_id}/{index}/thumbnail", response_class=Response)
async def thumbnail(
    job_id: JobId, index: int, visit: Here, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """The small look at one finished picture."""
    return await _file(visit, job_id, index, "thumbnail", None, if_none_match, attachment=False)


async def _file(
    visit: Visit,
    job_id: str,
    index: int,
    kind: str,
    extension: str | None,
    known_etag: str | None,
    attachment: bool,
) -> Response:
    job = (await visit.desk.get(job_id, visit.owner)).job
    artifact = next((a for a in job.artifacts if (a.index, a.kind) == (index, kind)), None)
    if artifact is None:
        raise NotFound(
            f"job {job_id} has no {kind} {index}; it is {job.state.value} "
            f"and has {sum(a.kind == kind for a in job.artifacts)}",
            param="index",
        )
    if extension is not None and EXTENSIONS[artifact.media_type] != extension:
        raise NotFound(f"this picture is {index}.{EXTENSIONS[artifact.media_type]}", param="name")
    headers = _headers(job_id, artifact, attachment)
    if known_etag is not None and headers["ETag"] in (part.strip() for part in known_etag.split(",")):
        return Response(status_code=304, headers=headers)
    stored, data = await visit.desk.artifact(job_id, visit.owner, index, kind)
    return Response(data, headers=headers, media_type=stored.media_type)


def _headers(job_id: str, artifact: StoredArtifact, attachment: bool) -> dict[str, str]:
    small = "-thumbnail" if artifact.kind == "thumbnail" else ""
    name = f"weft-{job_id}-{artifact.index}{small}.{EXTENSIONS[artifact.media_type]}"
    return {
        "Content-Disposition": f'{"attachment" if attachment else "inline"}; filename="{name}"',
        "Cache-Control": FOREVER,
        "ETag": f'"{artifact.sha256}"',
    }
