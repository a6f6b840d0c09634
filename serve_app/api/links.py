"""Links to finished files that open without a key, for a while."""

import time
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from deployments.protocol.errors import NotFound
from serve_app.api.depends import Here, JobId

router = APIRouter(tags=["results"])

LONGEST_S = 86_400


class LinkOut(BaseModel):
    """Whoever has the address can open the file."""

    url: str
    expires_at: float = Field(description="Unix seconds.")


@router.get("/api/results/{task_id}/{index}/link")
async def link(
    job_id: JobId,
    index: int,
    visit: Here,
    kind: Annotated[
        str, Query(pattern="^[a-z]{1,20}$", description="image, video, thumbnail, ...")
    ] = "image",
    for_s: Annotated[int, Query(ge=1, le=LONGEST_S, description="Seconds it shall open for.")] = 900,
) -> LinkOut:
    """A presigned address of one finished file, straight from the bucket; only where results lie in one."""
    expires_at = time.time() + for_s
    url = await visit.desk.link(job_id, visit.owner, index, kind, for_s)
    if url is None:
        raise NotFound("this installation keeps results in a directory, which has no links; fetch the file")
    return LinkOut(url=url, expires_at=expires_at)
