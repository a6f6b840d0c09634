"""What `submit` needs of a request body, whatever dialect it was written in."""

from typing import ClassVar, Protocol

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard
from deployments.protocol.request import ControlType, GenerationRequest, Task
from serve_app.api.schemas.body import RequestBody
from serve_app.jobs.store.cache_keys import body_digest
from serve_app.loras.spec import LoraSpec


class SubmitBody(Protocol):
    """A request body that can become a job."""

    @property
    def model(self) -> str | None:
        """Id or alias of the model; None: the default model of the task."""

    @property
    def task(self) -> Task:
        """What the model has to be able to do."""

    @property
    def control_types(self) -> set[ControlType]:
        """Types of the control images in the body."""

    @property
    def uses_refiner(self) -> bool:
        """Whether the model needs a refiner."""

    @property
    def webhook(self) -> str | None:
        """URL to call when the job has ended."""

    @property
    def notices(self) -> tuple[Adjustment, ...]:
        """What the dialect changed before the request is validated; reported as warnings."""

    def fitted(
        self, request: GenerationRequest, card: ModelCard
    ) -> tuple[GenerationRequest, tuple[Adjustment, ...]]:
        """The request as this dialect corrects it for the card, with a warning for each change. Raises
        BadRequest."""

    def lora_specs(self) -> tuple[LoraSpec, ...]:
        """LoRAs that the body asks for. Raises BadRequest."""

    def to_request(self, model: str) -> GenerationRequest:
        """The same request without its dialect. Raises BadRequest, or pydantic's ValidationError."""

    def digest(self) -> str:
        """SHA-256 of the body: equal for equal bodies of one kind."""


class SubmitDefaults(RequestBody):
    """The answers of a body that has no control images, refiner, webhook or LoRAs."""

    kind: ClassVar[str]  # of the body in its digest: another one would change the digests of stored keys

    @property
    def control_types(self) -> set[ControlType]:
        return set()

    @property
    def uses_refiner(self) -> bool:
        return False

    @property
    def webhook(self) -> str | None:
        return None

    @property
    def notices(self) -> tuple[Adjustment, ...]:
        return ()

    def fitted(
        self, request: GenerationRequest, card: ModelCard
    ) -> tuple[GenerationRequest, tuple[Adjustment, ...]]:
        """As it is: what the card does not allow is refused."""
        del card
        return request, ()

    def lora_specs(self) -> tuple[LoraSpec, ...]:
        return ()

    def digest(self) -> str:
        return body_digest(self, kind=self.kind)
