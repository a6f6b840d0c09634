"""Links to finished files that open without a key until they expire."""

import time
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel, Field

from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import JobId
from serve_app.api.results import FileSelection, file_of
from serve_app.api.state import CurrentState

router = APIRouter(tags=["results"])
public = APIRouter(tags=["results"])

MAX_LINK_S = 86_400
ArtifactKind = Annotated[str, Query(pattern="^[a-z]{1,20}$", description="image, video, thumbnail, ...")]


class LinkOut(BaseModel):
    """The address opens the file for anyone who has it."""

    url: str
    expires_at: float = Field(description="Unix seconds.")


@router.get("/api/results/{task_id}/{index}/link")
async def link(
    job_id: JobId,
    index: int,
    caller: CurrentCaller,
    kind: ArtifactKind = "image",
    for_s: Annotated[int, Query(ge=1, le=MAX_LINK_S, description="Seconds until it expires.")] = 900,
) -> LinkOut:
    """A signed address of one finished file: the bucket's own where results are in one, else Weft's."""
    expires_at = int(time.time()) + for_s
    url = await caller.job_service.link(job_id, caller.owner, index, kind, for_s)
    if url is None:
        signature = await caller.job_service.sign(job_id, caller.owner, index, kind, expires_at)
        path = f"{caller.address}/api/shared/{job_id}/{index}/{kind}"
        url = f"{path}?expires={expires_at}&signature={signature}"
    return LinkOut(url=url, expires_at=expires_at)


@public.get("/api/shared/{task_id}/{index}/{kind}", response_class=Response)
async def open_link(
    job_id: JobId,
    index: int,
    kind: str,
    state: CurrentState,
    expires: Annotated[int, Query(description="Unix seconds, as it came with the link.")] = 0,
    signature: Annotated[str, Query(max_length=200)] = "",
    if_none_match: Annotated[str | None, Header()] = None,
    byte_range: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header()] = None,
) -> Response:
    """The file behind such a link, without a key. 401 once it has expired or when it was altered."""
    job = await state.job_service.shared(job_id, index, kind, expires, signature)
    selection = FileSelection(
        index, kind, known_etags=if_none_match, byte_range=byte_range, if_range=if_range
    )
    response = await file_of(state.job_service, job, selection)
    response.headers["Cache-Control"] = f"private, max-age={max(0, expires - int(time.time()))}"
    response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"  # any site may embed it
    return response
