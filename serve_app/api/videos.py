"""Videos in every dialect: native, tasks, and OpenAI's /v1/videos; the openai SDK works unchanged."""

from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Response
from starlette.requests import Request

from deployments.protocol.errors import BadRequest, Conflict, NotFound, Overloaded
from serve_app.api.gallery import FileSelection, result_file
from serve_app.api.request_body import documented, read_json, read_json_or_form
from serve_app.api.schemas.job import JobAccepted, WarningOut
from serve_app.api.schemas.video import (
    ExtendRequest,
    OpenAIVideoBody,
    RemixRequest,
    VideoBody,
    VideoDeleted,
    VideoEditBody,
    VideoExtendBody,
    VideoObject,
    VideoPage,
    VideoRemixBody,
)
from serve_app.api.state import CallerContext, CurrentCaller, JobId
from serve_app.api.state import job_id as checked_id
from serve_app.api.tasks import TaskAccepted
from serve_app.jobs.job import Job, JobState

router = APIRouter(tags=["videos"])
FILES = ("image",)
REFERENCE = ("input_reference",)
SOURCE = ("video",)
PAGE = 100  # jobs read at once while looking for videos
MAX_PAGES = 20
CANCEL_WAIT_S = 30.0  # for a running job to end before it is deleted
POLL_MS = "500"  # what the SDK's create_and_poll waits between two looks


@router.post("/api/generate/video", status_code=202, openapi_extra=documented(VideoBody, FILES))
async def generate_video(http_request: Request, response: Response, caller: CurrentCaller) -> JobAccepted:
    """Accept a wish for a video and answer at once; the job is then followed by its id.

    JSON, or a multipart form with the file `image`.
    """
    job = await caller.submit(await read_json_or_form(http_request, VideoBody, FILES))
    response.headers["Location"] = f"{caller.prefix}/api/generate/{job.id}"
    return JobAccepted(id=job.id, status=job.state, warnings=[WarningOut.of(c) for c in job.warnings])


@router.post("/generate-video", status_code=202, openapi_extra=documented(VideoBody, FILES))
async def generate_video_task(http_request: Request, caller: CurrentCaller) -> TaskAccepted:
    """Accept a wish for a video; the body is that of POST /api/generate/video."""
    job = await caller.submit(await read_json_or_form(http_request, VideoBody, FILES))
    return TaskAccepted(task_id=job.id, status=job.state, warnings=[WarningOut.of(c) for c in job.warnings])


@router.post("/v1/videos", openapi_extra=documented(OpenAIVideoBody, REFERENCE))
async def create_video(http_request: Request, response: Response, caller: CurrentCaller) -> VideoObject:
    """Begin a video; a form as the SDK sends it, or JSON."""
    job = await caller.submit(await read_json_or_form(http_request, OpenAIVideoBody, REFERENCE))
    response.headers["openai-poll-after-ms"] = POLL_MS
    return _shown(caller, job)


@router.get("/v1/videos")
async def list_videos(
    caller: CurrentCaller,
    after: Annotated[str | None, Query(max_length=32, description="last_id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoPage:
    """The caller's videos, newest first unless told otherwise."""
    known = await _videos(caller)
    if order == "asc":
        known.reverse()
    if after is not None:
        ids = [job.id for job in known]
        if after not in ids:
            raise BadRequest("after is no id of your videos; leave it out to start", param="after")
        known = known[ids.index(after) + 1 :]
    shown = known[:limit]
    return VideoPage(
        data=[_shown(caller, job) for job in shown],
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(known) > limit,
    )


@router.get("/v1/videos/{task_id}")
async def read_video(job_id: JobId, response: Response, caller: CurrentCaller) -> VideoObject:
    """One video as it stands."""
    response.headers["openai-poll-after-ms"] = POLL_MS
    return _shown(caller, await _video(caller, job_id))


@router.delete("/v1/videos/{task_id}")
async def delete_video(job_id: JobId, caller: CurrentCaller) -> VideoDeleted:
    """Delete a video with its files; one that is not finished is cancelled first."""
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
    """The same video, seed and all, by another prompt."""
    original = await _completed(caller, job_id)
    body = await read_json(http_request, VideoRemixBody)
    return await _remix(caller, original, body.prompt, response)


@router.post("/v1/videos/edits", openapi_extra=documented(VideoEditBody, SOURCE))
async def edit_video(http_request: Request, response: Response, caller: CurrentCaller) -> VideoObject:
    """What a remix is, under its newer name: `video` is the id of a video made here, no file."""
    body = await read_json_or_form(http_request, VideoEditBody, SOURCE)
    return await _remix(caller, await _completed(caller, checked_id(body.source_id)), body.prompt, response)


@router.post("/v1/videos/extensions", openapi_extra=documented(VideoExtendBody, SOURCE))
async def extend_video(http_request: Request, response: Response, caller: CurrentCaller) -> VideoObject:
    """A new video that begins with the last frame of a frame-wise one; the two are not joined."""
    body = await read_json_or_form(http_request, VideoExtendBody, SOURCE)
    original = await _completed(caller, checked_id(body.source_id))
    request = ExtendRequest(original=original.request, prompt=body.prompt, seconds=body.seconds)
    job = await caller.submit(request)
    response.headers["openai-poll-after-ms"] = POLL_MS
    return _shown(caller, job)


@router.post("/v1/videos/characters", status_code=404)
async def create_character(caller: CurrentCaller) -> None:
    """There are none: 404."""
    raise NotFound("no model here learns a character from a video; train a LoRA and send it as loras")


@router.get("/v1/videos/characters/{character_id}", status_code=404)
async def read_character(character_id: str, caller: CurrentCaller) -> None:
    """There is none: 404."""
    raise NotFound("there are no characters here; people and styles come as LoRAs: GET /api/loras/")


def _shown(caller: CallerContext, job: Job, remixed_from: str | None = None) -> VideoObject:
    return VideoObject.of(job, caller.state.settings.record_ttl_s, remixed_from)


async def _video(caller: CallerContext, job_id: str) -> Job:
    job = (await caller.job_service.get(job_id, caller.owner)).job
    if job.request.video is None:
        raise NotFound("this job makes pictures, not a video; GET /api/generate/{id} tells of it", param="id")
    return job


async def _completed(caller: CallerContext, job_id: str) -> Job:
    job = await _video(caller, job_id)
    if job.state is not JobState.completed:
        raise Conflict(f"the video is {job.state.value}; ask again when it is completed")
    return job


async def _remix(caller: CallerContext, original: Job, prompt: str, response: Response) -> VideoObject:
    if original.request.edit is not None:
        raise BadRequest("the picture this video began with is no longer stored; begin a new one with it")
    job = await caller.submit(RemixRequest(original=original.request, prompt=prompt))
    response.headers["openai-poll-after-ms"] = POLL_MS
    return _shown(caller, job, remixed_from=original.id)


async def _videos(caller: CallerContext) -> list[Job]:
    """The caller's newest videos, as far as MAX_PAGES of jobs go back."""
    found: list[Job] = []
    cursor: str | None = None
    for _ in range(MAX_PAGES):
        page = await caller.job_service.list(caller.owner, cursor=cursor, limit=PAGE)
        found += [job for job in page.jobs if job.request.video is not None]
        cursor = page.next_cursor
        if cursor is None:
            break
    return found
