"""From a request body to a stored job: what every dialect does after it has parsed its body."""

import re
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

from pydantic import ValidationError

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import ControlType, GenerationRequest, Task
from serve_app.admission.model_aliases import resolve_model
from serve_app.admission.principals import LOCAL
from serve_app.admission.validation import default_model, find_card
from serve_app.api.caller import CallerContext
from serve_app.api.schemas.submit_body import SubmitBody
from serve_app.api.state import ERROR, FAILED, READY
from serve_app.api.validation_messages import bad_request
from serve_app.jobs.job import IdempotencyKey, Job
from serve_app.loras.spec import extract_lora_tags

IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


async def submit(caller: CallerContext, body: SubmitBody) -> Job:
    """The stored job. Raises what JobService.submit raises, and BadRequest for what the body cannot mean."""
    began = time.perf_counter()
    model = body.model
    aliased: tuple[Adjustment, ...] = ()
    if model is None:
        model = await choose_model(
            caller, (body.task,), controls=body.control_types, refiner=body.uses_refiner
        )
    else:
        card, aliased = resolve_model(model, caller.state.cards, caller.state.settings.model_aliases)
        model = card.id
    request = _to_request(body, model)
    request, corrected = body.fitted(request, find_card(model, caller.state.cards))
    await caller.state.input_check.verify(request, caller.owner)
    async with _with_loras(caller, body, request) as complete:
        job = await caller.job_service.submit(
            complete,
            caller.owner,
            idempotency_key=_idempotency_key(caller, body),
            webhook=body.webhook,
            images_per_day=caller.principal.images_per_day,
            api_key="" if caller.owner == LOCAL else caller.principal.key,
            budget_per_month=caller.principal.budget_per_month,
            notices=(*aliased, *body.notices, *corrected),
        )
    await caller.body_slot.aclose()  # a synchronous dialect waits on without the body
    _count(caller, job, time.perf_counter() - began)
    return job


async def choose_model(
    caller: CallerContext,
    tasks: Sequence[Task],
    *,
    controls: Collection[ControlType] = (),
    refiner: bool = False,
) -> str:
    """Id of the model for a body that names none: of the first of these tasks that any model can do.

    Raises as default_model does.
    """
    state = caller.state
    states = await state.model_states()
    able = [task for task in tasks if any(task in card.tasks for card in state.cards.values())]
    return default_model(
        able[0] if able else tasks[0],
        state.cards,
        [model for model, found in states.items() if found == READY],
        controls=controls,
        refiner=refiner,
        failed=[model for model, found in states.items() if found in (FAILED, ERROR)],
    )


def _to_request(body: SubmitBody, model: str) -> GenerationRequest:
    try:
        return body.to_request(model)
    except ValidationError as error:  # outside the limits that hold for every model
        raise bad_request(error, GenerationRequest) from None


@asynccontextmanager
async def _with_loras(
    caller: CallerContext, body: SubmitBody, request: GenerationRequest
) -> AsyncIterator[GenerationRequest]:
    """The request with the LoRAs of its fields and prompt tags; their files stay while this is open."""
    prompt, tagged = extract_lora_tags(request.prompt)
    specs = (*body.lora_specs(), *tagged)
    if not specs and not request.loras:
        yield request
        return
    card = find_card(request.model, caller.state.cards)
    async with caller.lora_service.resolve(specs, caller.owner, card, again=request.loras) as loras:
        yield request.model_copy(update={"prompt": prompt, "loras": loras})


def _idempotency_key(caller: CallerContext, body: SubmitBody) -> IdempotencyKey | None:
    """The caller's Idempotency-Key with the digest of the body. Raises BadRequest for a malformed one."""
    if caller.idempotency_key is None:
        return None
    if not IDEMPOTENCY_KEY.fullmatch(caller.idempotency_key):
        raise BadRequest(
            "an Idempotency-Key is 1 to 255 visible ASCII characters, such as a UUID",
            param="Idempotency-Key",
        )
    return IdempotencyKey(caller.idempotency_key, body.digest())


def _count(caller: CallerContext, job: Job, seconds: float) -> None:
    metrics, model = caller.state.metrics, job.request.model
    metrics.add("weft_jobs_submitted_total", model=model, task=job.request.task.value)
    metrics.observe("weft_job_submit_seconds", seconds)
    if job.cached_from is not None or job.leader is not None:
        metrics.add(
            "weft_jobs_same_total", model=model, how="joined" if job.cached_from is None else "copied"
        )
