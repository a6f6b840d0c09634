"""POST /v1/images/edits: one call that waits for the edited images, or streams them."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard
from deployments.protocol.request import Task
from serve_app.admission.model_aliases import resolve_model
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext
from serve_app.api.openai.edit_schemas import EDIT_FILES, EditSubmission, OpenAIEditBody, edit_task
from serve_app.api.openai.image_schemas import ImagesResponse
from serve_app.api.openai.images import finished_images
from serve_app.api.openai.names import in_openai_names
from serve_app.api.request_body import documented, read_json_or_form
from serve_app.api.submit import choose_model, submit

router = APIRouter(tags=["openai"])


@router.post(
    "/v1/images/edits",
    response_model=ImagesResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
    openapi_extra=documented(OpenAIEditBody, EDIT_FILES),
)
async def edit_images(http_request: Request, caller: CurrentCaller) -> ImagesResponse | Response:
    """Edit images and wait for the result. A client that disconnects cancels the work.

    With a mask the image is inpainted. Without one a model with the task `edit` follows the prompt as an
    instruction about all images; any other starts from the one image, with a warning that says so.
    """
    body = await read_json_or_form(http_request, OpenAIEditBody, EDIT_FILES)
    with in_openai_names():
        card, aliased = await _card(caller, body)
        job = await submit(caller, EditSubmission(body, card, edit_task(body, card), aliased))
    return await finished_images(caller, job, http_request, body, event="image_edit")


async def _card(caller: CallerContext, body: OpenAIEditBody) -> tuple[ModelCard, tuple[Adjustment, ...]]:
    """Of the model that the body names, with a warning if that is by an alias, or of the first that can edit.
    Raises NotFound, BadRequest, ModelUnavailable."""
    tasks = (Task.edit, Task.i2i) if body.mask is None else (Task.inpaint,)
    model = await choose_model(caller, tasks) if body.model is None else body.model
    return resolve_model(model, caller.state.cards, caller.state.settings.model_aliases)
