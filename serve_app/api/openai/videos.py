"""/v1/videos: create, read, list, download, remix, edit, extend and delete."""

from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Response
from starlette.requests import Request

from deployments.protocol.errors import BadRequest, Conflict, NotFound, Overloaded
from deployments.protocol.request import Task
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext, JobId, parse_job_id
from serve_app.api.openai.video_schemas import (
    ExtendRequest,
    OpenAIVideoBody,
    RemixRequest,
    VideoDeleted,
    VideoEditBody,
    VideoExtendBody,
    VideoObject,
    VideoPage,
    VideoRemixBody,
)
from serve_app.api.request_body import documented, read_json, read_json_or_form
from serve_app.api.results import FileSelection, result_file
from serve_app.api.schemas.submit_body import SubmitBody
from serve_app.api.submit import submit
from serve_app.jobs.job import Job, JobState

router = APIRouter(tags=["videos"])
REFERENCE_FILES = ("input_reference",)
SOURCE_FILES = ("video",)
JOBS_PER_PAGE = 100  # read at once while looking for videos
MAX_PAGES = 20
CANCEL_WAIT_S = 30.0  # for a running job to end before it is deleted
POLL_MS = "500"  # what the SDK's create_and_poll waits between two reads


@router.post("/v1/videos", openapi_extra=documented(OpenAIVideoBody, REFERENCE_FILES))
async def create_video(http_request: Request, response: Response, caller: CurrentCaller) -> VideoObject:
    """Start a video, from a form as the SDK sends it or from JSON."""
    body = await read_json_or_form(http_request, OpenAIVideoBody, REFERENCE_FILES)
    return await _started(caller, body, response)


@router.get("/v1/videos")
async def list_videos(
    caller: CurrentCaller,
    after: Annotated[str | None, Query(max_length=32, description="last_id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoPage:
    """The caller's videos, newest first by default."""
    videos = await _videos(caller)
    if order == "asc":
        videos.reverse()
    if after is not None:
        ids = [job.id for job in videos]
        if after not in ids:
            raise BadRequest("after is no id of your videos; leave it out to start", param="after")
        videos = videos[ids.index(after) + 1 :]
    shown = videos[:limit]
    return VideoPage(
        data=[_video_object(caller, job) for job in shown],
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(videos) > limit,
    )


@router.get("/v1/videos/{task_id}")
async def read_video(job_id: JobId, response: Response, caller: CurrentCaller) -> VideoObject:
    """The current state of one video."""
    response.headers["openai-poll-after-ms"] = POLL_MS
    return _video_object(caller, await _video(caller, job_id))


@router.delete("/v1/videos/{task_id}")
async def delete_video(job_id: JobId, caller: CurrentCaller) -> VideoDeleted:
    """Delete a video with its files; an unfinished one is cancelled first."""
    job = await _video(caller, job_id)
    if not job.state.ended:
        await caller.job_service.cancel(job_id, caller.owner)
        job = await caller.job_service.wait(job_id, caller.owner, CANCEL_WAIT_S)
        if not job.state.ended:
            raise Overloaded("the video is being cancelled; delete it again in a moment", retry_after_s=5)
    await caller.job_service.delete(job_id, caller.owner)
    return VideoDeleted(id=job_id)


@router.get("/v1/videos/{task_id}/content", response_class=Response)
async def read_content(
    job_id: JobId,
    caller: CurrentCaller,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
    if_none_match: Annotated[str | None, Header()] = None,
    byte_range: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header()] = None,
) -> Response:
    """The finished file, its thumbnail, or up to 25 of its frames in rows of 5."""
    job = await _video(caller, job_id)
    if job.error is not None:
        raise job.error.to_error()
    if job.state is not JobState.completed:
        raise Conflict(f"the video is {job.state.value}; ask for its content when it is completed")
    selection = FileSelection(0, variant, known_etags=if_none_match, byte_range=byte_range, if_range=if_range)
    return await result_file(caller, job_id, selection)


@router.post("/v1/videos/{task_id}/remix", openapi_extra=documented(VideoRemixBody))
async def remix_video(
    job_id: JobId, http_request: Request, response: Response, caller: CurrentCaller
) -> VideoObject:
    """The same video, with the same seed and another prompt."""
    original = await _completed_video(caller, job_id)
    body = await read_json(http_request, VideoRemixBody)
    return await _remix(caller, original, body.prompt, response)


@router.post("/v1/videos/edits", openapi_extra=documented(VideoEditBody, SOURCE_FILES))
async def edit_video(http_request: Request, response: Response, caller: CurrentCaller) -> VideoObject:
    """A remix under its newer name: `video` is the id of a video made here, not a file."""
    body = await read_json_or_form(http_request, VideoEditBody, SOURCE_FILES)
    original = await _completed_video(caller, parse_job_id(body.source_id))
    return await _remix(caller, original, body.prompt, response)


@router.post("/v1/videos/extensions", openapi_extra=documented(VideoExtendBody, SOURCE_FILES))
async def extend_video(http_request: Request, response: Response, caller: CurrentCaller) -> VideoObject:
    """A new video that begins with the last frame of a frame-wise one; the two are not joined."""
    body = await read_json_or_form(http_request, VideoExtendBody, SOURCE_FILES)
    original = await _completed_video(caller, parse_job_id(body.source_id))
    request = ExtendRequest(original=original.request, prompt=body.prompt, seconds=body.seconds)
    return await _started(caller, request, response)


@router.post("/v1/videos/characters", status_code=404)
async def create_character() -> None:
    """Not supported: always 404."""
    raise NotFound("no model here learns a character from a video; train a LoRA and send it as loras")


@router.get("/v1/videos/characters/{character_id}", status_code=404)
async def read_character(character_id: str) -> None:
    """Not supported: always 404."""
    raise NotFound(
        f"there is no character {character_id[:40]!r}; people and styles come as LoRAs: GET /api/loras/"
    )


async def _started(
    caller: CallerContext, body: SubmitBody, response: Response, *, remixed_from: str | None = None
) -> VideoObject:
    job = await submit(caller, body)
    response.headers["openai-poll-after-ms"] = POLL_MS
    return _video_object(caller, job, remixed_from)


async def _remix(caller: CallerContext, original: Job, prompt: str, response: Response) -> VideoObject:
    if original.request.task is Task.i2v:
        raise BadRequest(
            "the pictures this video began or ended with are no longer stored; begin a new one with them"
        )
    request = RemixRequest(original=original.request, prompt=prompt)
    return await _started(caller, request, response, remixed_from=original.id)


def _video_object(caller: CallerContext, job: Job, remixed_from: str | None = None) -> VideoObject:
    return VideoObject.of(job, caller.state.settings.record_ttl_s, remixed_from)


async def _video(caller: CallerContext, job_id: str) -> Job:
    job = (await caller.job_service.get(job_id, caller.owner)).job
    if job.request.video is None:
        raise NotFound("this job makes pictures, not a video; see GET /api/generate/{id}", param="id")
    return job


async def _completed_video(caller: CallerContext, job_id: str) -> Job:
    job = await _video(caller, job_id)
    if job.state is not JobState.completed:
        raise Conflict(f"the video is {job.state.value}; ask again when it is completed")
    return job


async def _videos(caller: CallerContext) -> list[Job]:
    """The caller's newest videos, as far as MAX_PAGES pages of jobs go back."""
    found: list[Job] = []
    cursor: str | None = None
    for _ in range(MAX_PAGES):
        page = await caller.job_service.list(caller.owner, cursor=cursor, limit=JOBS_PER_PAGE)
        found += [job for job in page.jobs if job.request.video is not None]
        cursor = page.next_cursor
        if cursor is None:
            break
    return found
