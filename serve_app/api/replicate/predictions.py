"""/v1/predictions: create, read, list and cancel."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from starlette.requests import Request

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import NotFound, WeftError
from serve_app.admission.model_aliases import resolve_model
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext, JobId
from serve_app.api.foreign import renamed_error
from serve_app.api.replicate.names import NAMES
from serve_app.api.replicate.requests import prepare
from serve_app.api.replicate.schemas import Prediction, PredictionBody, PredictionPage, VersionBody
from serve_app.api.request_body import documented, read_json
from serve_app.api.submit import submit

router = APIRouter(tags=["replicate"])
WAIT = re.compile(r"\bwait(?:=([0-9]{1,4}))?\b")
DEFAULT_WAIT_S = 60.0
PER_PAGE = 100
Prefer = Annotated[str, Header(max_length=100, description="wait, or wait=SECONDS: answer when it is done.")]
Cursor = Annotated[str | None, Query(max_length=100, description="Of `next` of the page before.")]


@router.post("/v1/predictions", status_code=201, openapi_extra=documented(VersionBody))
async def create_prediction(
    http_request: Request, response: Response, caller: CurrentCaller, prefer: Prefer = ""
) -> Prediction:
    """Start a prediction of the model that `version` names."""
    body = await read_json(http_request, VersionBody)
    return await _created(caller, body, body.version, response, prefer)


@router.post(
    "/v1/models/{owner}/{name}/predictions", status_code=201, openapi_extra=documented(PredictionBody)
)
async def create_model_prediction(
    owner: str,
    name: str,
    http_request: Request,
    response: Response,
    caller: CurrentCaller,
    prefer: Prefer = "",
) -> Prediction:
    """Start a prediction of this model: by its hub id, or any owner with its id."""
    body = await read_json(http_request, PredictionBody)
    return await _created(caller, body, f"{owner}/{name}", response, prefer)


@router.get("/v1/predictions")
async def list_predictions(caller: CurrentCaller, cursor: Cursor = None) -> PredictionPage:
    """The caller's jobs, newest first."""
    page = await caller.job_service.list(caller.owner, cursor=cursor, limit=PER_PAGE)
    after = page.next_cursor
    return PredictionPage(
        next=None if after is None else f"{caller.address}/v1/predictions?cursor={after}",
        results=[Prediction.of(job, caller.address) for job in page.jobs],
    )


@router.get("/v1/predictions/{task_id}")
async def read_prediction(job_id: JobId, caller: CurrentCaller) -> Prediction:
    """The state of one prediction, with links to its files once it has succeeded."""
    return Prediction.of((await caller.job_service.get(job_id, caller.owner)).job, caller.address)


@router.post("/v1/predictions/{task_id}/cancel")
async def cancel_prediction(job_id: JobId, caller: CurrentCaller) -> Prediction:
    """Cancel a prediction; one that runs stops at its next step."""
    return Prediction.of(await caller.job_service.cancel(job_id, caller.owner), caller.address)


def find_model(caller: CallerContext, reference: str) -> ModelCard:
    """The card that owner/name, owner/name:version or an id means. Raises NotFound."""
    name = reference.partition(":")[0]
    state = caller.state
    try:
        return resolve_model(name, state.cards, {})[0]
    except NotFound:
        if "/" in name:
            short = name.rpartition("/")[2]
            if short in state.cards:
                return state.cards[short]
    return resolve_model(name, state.cards, state.settings.model_aliases)[0]


async def _created(
    caller: CallerContext, body: PredictionBody, model: str, response: Response, prefer: str
) -> Prediction:
    try:
        job = await submit(caller, prepare(body, find_model(caller, model), model))
    except WeftError as error:
        raise renamed_error(error, NAMES) from None
    wait = WAIT.search(prefer)
    if wait is not None:
        asked_s = float(wait[1] or DEFAULT_WAIT_S)
        job = await caller.job_service.wait(
            job.id, caller.owner, min(asked_s, caller.state.settings.sync_wait_s)
        )
    prediction = Prediction.of(job, caller.address)
    response.headers["Location"] = prediction.urls["get"]
    if wait is not None and not job.state.ended:
        return prediction.model_copy(update={"status": "starting"})  # clients take any other as an end
    return prediction
