"""POST /api/generate/image: answers at once with the job's id."""

from fastapi import APIRouter, Response
from starlette.requests import Request

from serve_app.api.auth import CurrentCaller
from serve_app.api.native.image_body import IMAGE_FILES, ImageBody
from serve_app.api.request_body import documented, read_json_or_form
from serve_app.api.schemas.job import JobAccepted
from serve_app.api.submit import submit

router = APIRouter(tags=["generate"])


@router.post("/api/generate/image", status_code=202, openapi_extra=documented(ImageBody, IMAGE_FILES))
async def generate_image(http_request: Request, response: Response, caller: CurrentCaller) -> JobAccepted:
    """Accept a request for images and answer at once; the job is then followed by its id.

    JSON, or a multipart form with the files `image`, `mask_image`, `control_image` and up to ten
    `reference_images`. A call with the header
    `Idempotency-Key` that is repeated within a day is answered with the job of the first call.
    """
    job = await submit(caller, await read_json_or_form(http_request, ImageBody, IMAGE_FILES))
    response.headers["Location"] = f"{caller.prefix}/api/generate/{job.id}"
    return JobAccepted.of(job)
