"""What a model can do, as the native dialect tells it: the page knows no model by name."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, Field

from deployments.protocol.card import Guidance, Licence, ModelCard, Sizes, Steps


class Readiness(StrEnum):
    """How soon a model would begin."""

    ready = "ready"
    loading = "loading"
    on_demand = "on_demand"  # no replica now; the first request starts one
    not_installed = "not_installed"  # its weights are not here
    error = "error"


@dataclass(frozen=True, slots=True)
class ModelState:
    """How one model is now."""

    state: Readiness
    detail: str = ""
    percent: int | None = None  # of loading


class ModelOut(BaseModel):
    """One model and all a client needs to fill its form."""

    id: str
    name: str
    family: str
    description: str
    aliases: list[str] = Field(description="Other names a request may use.")
    tasks: list[str]
    steps: Steps
    guidance: Guidance
    sizes: Sizes
    corrects: bool = Field(description="Steps and guidance out of range are corrected with a warning.")
    negative_prompt: bool
    max_images: int
    max_prompt_chars: int
    max_sequence_length: int | None
    schedulers: list[str]
    strength: float = Field(description="Default for a picture to start from.")
    trigger_words: list[str]
    vram_gib: float
    licence: Licence
    state: Readiness
    state_detail: str = ""
    percent: int | None = None

    @classmethod
    def of(cls, card: ModelCard, state: ModelState) -> Self:
        return cls(
            id=card.id,
            name=card.name,
            family=card.family,
            description=card.description,
            aliases=card.aliases,
            tasks=card.tasks,
            steps=card.steps,
            guidance=card.guidance,
            sizes=card.sizes,
            corrects=card.corrects,
            negative_prompt=card.negative_prompt,
            max_images=card.max_images,
            max_prompt_chars=card.max_prompt_chars,
            max_sequence_length=card.max_sequence_length,
            schedulers=card.schedulers,
            strength=card.strength,
            trigger_words=card.trigger_words,
            vram_gib=card.vram_gib,
            licence=card.licence,
            state=state.state,
            state_detail=state.detail,
            percent=state.percent,
        )


class ModelList(BaseModel):
    models: list[ModelOut]
