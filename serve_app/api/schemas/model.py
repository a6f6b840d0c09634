"""What a model can do, as the native dialect tells it: the page knows no model by name."""

from typing import Self

from pydantic import BaseModel, Field

from deployments.protocol.card import Guidance, Licence, ModelCard, Sizes, Steps


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
    state: str = Field(
        description="ready; loading; idle: the first request starts it; error; absent: not deployed.",
        examples=["ready"],
    )

    @classmethod
    def of(cls, card: ModelCard, state: str) -> Self:
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
            state=state,
        )


class ModelList(BaseModel):
    models: list[ModelOut]
