"""POST /generate-video: the native video body, answered with a task id."""

from fastapi import APIRouter
from starlette.requests import Request

from serve_app.api.auth import CurrentCaller
from serve_app.api.native.video_body import VIDEO_FILES, VideoBody
from serve_app.api.request_body import documented, read_json_or_form
from serve_app.api.submit import submit
from serve_app.api.tasks.schemas import TaskAccepted

router = APIRouter(tags=["videos"])


@router.post("/generate-video", status_code=202, openapi_extra=documented(VideoBody, VIDEO_FILES))
async def generate_video_task(http_request: Request, caller: CurrentCaller) -> TaskAccepted:
    """Accept a request for a video; the body is that of POST /api/generate/video."""
    return TaskAccepted.of(
        await submit(caller, await read_json_or_form(http_request, VideoBody, VIDEO_FILES))
    )
