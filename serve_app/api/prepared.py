"""A request that a foreign dialect has put together, with what it changed."""

from dataclasses import dataclass

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard
from deployments.protocol.request import ControlType, GenerationRequest, Task
from serve_app.admission.foreign_values import fit_values
from serve_app.loras.spec import LoraSpec


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A submission whose model and values are settled; see SubmitBody."""

    request: GenerationRequest
    body_digest: str  # SHA-256 of the body that it was written in
    notices: tuple[Adjustment, ...] = ()
    webhook: str | None = None
    loras: tuple[LoraSpec, ...] = ()

    @property
    def model(self) -> str:
        return self.request.model

    @property
    def task(self) -> Task:
        return self.request.task

    @property
    def control_types(self) -> set[ControlType]:
        return {control.type for control in self.request.controls}

    @property
    def uses_refiner(self) -> bool:
        return bool(self.request.refiner)

    def fitted(
        self, request: GenerationRequest, card: ModelCard
    ) -> tuple[GenerationRequest, tuple[Adjustment, ...]]:
        """With what the card does not allow corrected: the clients of these dialects cannot be changed."""
        return fit_values(request, card)

    def lora_specs(self) -> tuple[LoraSpec, ...]:
        return self.loras

    def digest(self) -> str:
        return self.body_digest

    def to_request(self, model: str) -> GenerationRequest:
        return self.request.model_copy(update={"model": model})
