"""POST /api/generate/video: answers at once with the job's id."""

from fastapi import APIRouter, Response
from starlette.requests import Request

from serve_app.api.auth import CurrentCaller
from serve_app.api.native.video_body import VIDEO_FILES, VideoBody
from serve_app.api.request_body import documented, read_json_or_form
from serve_app.api.schemas.job import JobAccepted
from serve_app.api.submit import submit

router = APIRouter(tags=["videos"])


@router.post("/api/generate/video", status_code=202, openapi_extra=documented(VideoBody, VIDEO_FILES))
async def generate_video(http_request: Request, response: Response, caller: CurrentCaller) -> JobAccepted:
    """Accept a request for a video and answer at once; the job is then followed by its id.

    JSON, or a multipart form with the file `image`.
    """
    job = await submit(caller, await read_json_or_form(http_request, VideoBody, VIDEO_FILES))
    response.headers["Location"] = f"{caller.prefix}/api/generate/{job.id}"
    return JobAccepted.of(job)
