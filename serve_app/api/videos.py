"""Videos in every dialect: native, tasks, and OpenAI's /v1/videos; the openai SDK works unchanged."""

from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Response
from starlette.requests import Request

from deployments.protocol.errors import BadRequest, Conflict, NotFound, Overloaded
from serve_app.api.bodies import documented, read_json, read_json_or_form
from serve_app.api.depends import Here, JobId, Visit
from serve_app.api.depends import job_id as checked_id
from serve_app.api.gallery import Wanted, result_file
from serve_app.api.schemas.job import Accepted, Warned
from serve_app.api.schemas.video import (
    EditBody,
    ExtendBody,
    ExtendWish,
    RemixBody,
    RemixWish,
    VideoBody,
    VideoDeleted,
    VideoObject,
    VideoPage,
    VideosBody,
)
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
async def generate_video(http_request: Request, response: Response, visit: Here) -> Accepted:
    """Accept a wish for a video and answer at once; the job is then followed by its id.

    JSON, or a multipart form with the file `image`.
    """
    job = await visit.submit(await read_json_or_form(http_request, VideoBody, FILES))
    response.headers["Location"] = f"{visit.prefix}/api/generate/{job.id}"
    return Accepted(id=job.id, status=job.state, warnings=[Warned.of(c) for c in job.warnings])


@router.post("/generate-video", status_code=202, openapi_extra=documented(VideoBody, FILES))
async def generate_video_task(http_request: Request, visit: Here) -> TaskAccepted:
    """Accept a wish for a video; the body is that of POST /api/generate/video."""
    job = await visit.submit(await read_json_or_form(http_request, VideoBody, FILES))
    return TaskAccepted(task_id=job.id, status=job.state, warnings=[Warned.of(c) for c in job.warnings])


@router.post("/v1/videos", openapi_extra=documented(VideosBody, REFERENCE))
async def create_video(http_request: Request, response: Response, visit: Here) -> VideoObject:
    """Begin a video; a form as the SDK sends it, or JSON."""
    job = await visit.submit(await read_json_or_form(http_request, VideosBody, REFERENCE))
    response.headers["openai-poll-after-ms"] = POLL_MS
    return _shown(visit, job)


@router.get("/v1/videos")
async def list_videos(
    visit: Here,
    after: Annotated[str | None, Query(max_length=32, description="last_id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoPage:
    """The caller's videos, newest first unless told otherwise."""
    known = await _videos(visit)
    if order == "asc":
        known.reverse()
    if after is not None:
        ids = [job.id for job in known]
        if after not in ids:
            raise BadRequest("after is no id of your videos; leave it out to start", param="after")
        known = known[ids.index(after) + 1 :]
    shown = known[:limit]
    return VideoPage(
        data=[_shown(visit, job) for job in shown],
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(known) > limit,
    )


@router.get("/v1/videos/{task_id}")
async def read_video(job_id: JobId, response: Response, visit: Here) -> VideoObject:
    """One video as it stands."""
    response.headers["openai-poll-after-ms"] = POLL_MS
    return _shown(visit, await _video(visit, job_id))


@router.delete("/v1/videos/{task_id}")
async def delete_video(job_id: JobId, visit: Here) -> VideoDeleted:
    """Delete a video with its files; one that is not finished is cancelled first."""
    job = await _video(visit, job_id)
    if not job.state.ended:
        await visit.desk.cancel(job_id, visit.owner)
        job = await visit.desk.wait(job_id, visit.owner, CANCEL_WAIT_S)
        if not job.state.ended:
            raise Overloaded("the video is being cancelled; delete it again in a moment", retry_after_s=5)
    await visit.desk.delete(job_id, visit.owner)
    return VideoDeleted(id=job_id)


@router.get("/v1/videos/{task_id}/content", response_class=Response)
async def read_content(
    job_id: JobId,
    visit: Here,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
    if_none_match: Annotated[str | None, Header()] = None,
    byte_range: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header()] = None,
) -> Response:
    """The finished file, its thumbnail, or up to 25 of its frames in rows of 5."""
    job = await _video(visit, job_id)
    if job.error is not None:
        raise job.error.to_error()
    if job.state is not JobState.completed:
        raise Conflict(f"the video is {job.state.value}; ask for its content when it is completed")
    wanted = Wanted(0, variant, known_etags=if_none_match, byte_range=byte_range, if_range=if_range)
    return await result_file(visit, job_id, wanted)


@router.post("/v1/videos/{task_id}/remix", openapi_extra=documented(RemixBody))
async def remix_video(job_id: JobId, http_request: Request, response: Response, visit: Here) -> VideoObject:
    """The same video, seed and all, by another prompt."""
    original = await _completed(visit, job_id)
    body = await read_json(http_request, RemixBody)
    return await _remix(visit, original, body.prompt, response)


@router.post("/v1/videos/edits", openapi_extra=documented(EditBody, SOURCE))
async def edit_video(http_request: Request, response: Response, visit: Here) -> VideoObject:
    """What a remix is, under its newer name: `video` is the id of a video made here, no file."""
    body = await read_json_or_form(http_request, EditBody, SOURCE)
    return await _remix(visit, await _completed(visit, checked_id(body.source_id)), body.prompt, response)


@router.post("/v1/videos/extensions", openapi_extra=documented(ExtendBody, SOURCE))
async def extend_video(http_request: Request, response: Response, visit: Here) -> VideoObject:
    """A new video that begins with the last frame of a frame-wise one; the two are not joined."""
    body = await read_json_or_form(http_request, ExtendBody, SOURCE)
    original = await _completed(visit, checked_id(body.source_id))
    wish = ExtendWish(original=original.request, prompt=body.prompt, seconds=body.seconds)
    job = await visit.submit(wish)
    response.headers["openai-poll-after-ms"] = POLL_MS
    return _shown(visit, job)


@router.post("/v1/videos/characters", status_code=404)
async def create_character(visit: Here) -> None:
    """There are none: 404."""
    raise NotFound("no model here learns a character from a video; train a LoRA and send it as loras")


@router.get("/v1/videos/characters/{character_id}", status_code=404)
async def read_character(character_id: str, visit: Here) -> None:
    """There is none: 404."""
    raise NotFound("there are no characters here; people and styles come as LoRAs: GET /api/loras/")


def _shown(visit: Visit, job: Job, remixed_from: str | None = None) -> VideoObject:
    return VideoObject.of(job, visit.state.settings.record_ttl_s, remixed_from)


async def _video(visit: Visit, job_id: str) -> Job:
    job = (await visit.desk.get(job_id, visit.owner)).job
    if job.request.video is None:
        raise NotFound("this job makes pictures, not a video; GET /api/generate/{id} tells of it", param="id")
    return job


async def _completed(visit: Visit, job_id: str) -> Job:
    job = await _video(visit, job_id)
    if job.state is not JobState.completed:
        raise Conflict(f"the video is {job.state.value}; ask again when it is completed")
    return job


async def _remix(visit: Visit, original: Job, prompt: str, response: Response) -> VideoObject:
    if original.request.edit is not None:
        raise BadRequest("the picture this video began with is no longer stored; begin a new one with it")
    job = await visit.submit(RemixWish(original=original.request, prompt=prompt))
    response.headers["openai-poll-after-ms"] = POLL_MS
    return _shown(visit, job, remixed_from=original.id)


async def _videos(visit: Visit) -> list[Job]:
    """The caller's newest videos, as far as MAX_PAGES of jobs go back."""
    found: list[Job] = []
    cursor: str | None = None
    for _ in range(MAX_PAGES):
        page = await visit.desk.list(visit.owner, cursor=cursor, limit=PAGE)
        found += [job for job in page.jobs if job.request.video is not None]
        cursor = page.next_cursor
        if cursor is None:
            break
    return found
