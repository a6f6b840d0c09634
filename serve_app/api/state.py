"""What create_app is given: the services behind the API."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from deployments.protocol.card import ModelCard
from serve_app.admission.authenticator import Authenticator, StoreClient
from serve_app.admission.fair_slots import FairSlots
from serve_app.admission.input_check import InputCheck
from serve_app.api.metrics import ApiMetrics
from serve_app.jobs.service import JobService
from serve_app.loras.service import LoraService
from serve_app.settings import Settings

READY, FAILED, ERROR = "ready", "failed", "error"  # states of models
UPLOADS, UPLOADS_PER_OWNER, UPLOAD_WAIT_S = 32, 4, 60.0  # files that are received at once, on disk
LARGE_BODIES, LARGE_PER_OWNER = 16, 4  # bodies with pictures, in memory at once until they are stored
ModelPlans = Callable[[Iterable[str]], Awaitable[Mapping[str, Mapping[str, Mapping[str, object]] | None]]]
ModelProofs = Callable[[Iterable[str]], Awaitable[Mapping[str, Sequence[Mapping[str, object]] | None]]]


@dataclass(frozen=True, slots=True)
class ModelFailure:
    """Why a model cannot serve. Times are unix seconds; None: not known."""

    kind: str
    message: str
    since: float | None = None
    tries: int | None = None
    retry_at: float | None = None  # the first request from then on tries again


async def no_failures() -> dict[str, ModelFailure]:
    """For an app without replicas."""
    return {}


async def no_proofs(_models: Iterable[str]) -> dict[str, None]:
    """For an app without replicas."""
    return {}


@dataclass(frozen=True)
class ApiState:
    """The services of one app; the app opens and closes none of them."""

    job_service: JobService
    cards: Mapping[str, ModelCard]  # the models served here, by id
    settings: Settings
    model_states: Callable[[], Awaitable[Mapping[str, str]]]  # by id: ready, loading, idle, failed or error
    model_failures: Callable[[], Awaitable[Mapping[str, ModelFailure]]] = (
        no_failures  # by id; of the last two
    )
    # by id: what a replica has proven of batch sizes; None: no replica has reported
    model_proofs: ModelProofs = no_proofs
    # by id: how the models of a replica of it run on its device, or would; None: no replica has reported
    model_plans: ModelPlans = no_proofs
    input_check: InputCheck = field(default_factory=InputCheck)
    uploads: FairSlots = field(
        default_factory=lambda: FairSlots(UPLOADS, UPLOADS_PER_OWNER, UPLOAD_WAIT_S, "uploads")
    )
    large_bodies: FairSlots = field(
        default_factory=lambda: FairSlots(LARGE_BODIES, LARGE_PER_OWNER, UPLOAD_WAIT_S, "large calls")
    )
    metrics: ApiMetrics = field(default_factory=ApiMetrics)
    lora_service: LoraService | None = None  # None: requests cannot name LoRAs
    refresh_cards: Callable[[], Awaitable[None]] | None = None  # None: cards never change
    behind_serve: bool = False  # whether Ray Serve's proxy passes the calls on
    accounts: StoreClient | None = None  # the store of users and keys; None: there is only WEFT_API_KEY

    @cached_property
    def authenticator(self) -> Authenticator:
        """Checks keys, tokens, tickets and rate limits."""
        return Authenticator(self.settings, self.accounts)


def api_state(connection: HTTPConnection) -> ApiState:
    """What create_app was given."""
    state: ApiState = connection.app.state.weft
    return state


CurrentState = Annotated[ApiState, Depends(api_state)]
