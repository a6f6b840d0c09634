"""What a model can do, as the native dialect tells it: the page knows no model by name."""

from typing import Self

from pydantic import BaseModel, Field

from deployments.protocol.card import Guidance, Licence, ModelCard, Sizes, Steps, Videos
from serve_app.api.schemas.lora import LoraOut


class ControlOut(BaseModel):
    """One kind of control picture that a model takes."""

    type: str = Field(examples=["canny"])
    plain_pictures: bool = Field(description="false: only control maps; they need is_map: true.")
    licence: Licence


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
    videos: Videos | None = Field(description="What tasks t2v and i2v allow; null: it makes no videos.")
    corrects: bool = Field(description="Steps and guidance out of range are corrected with a warning.")
    negative_prompt: bool
    max_images: int
    max_prompt_chars: int
    max_sequence_length: int | None
    schedulers: list[str]
    strength: float = Field(description="Default for a picture to start from.")
    controls: list[ControlOut] = Field(description="Kinds of control picture it takes.")
    refiner: str | None = Field(description="The model that a request's refiner hands over to.")
    refiner_start: float = Field(description="Part of the steps at which the refiner takes over.")
    trigger_words: list[str]
    max_loras: int = Field(description="LoRAs that one request may name; 0: it takes none.")
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
            videos=card.videos,
            corrects=card.corrects,
            negative_prompt=card.negative_prompt,
            max_images=card.max_images,
            max_prompt_chars=card.max_prompt_chars,
            max_sequence_length=card.max_sequence_length,
            schedulers=card.schedulers,
            strength=card.strength,
            controls=[
                ControlOut(
                    type=kind,
                    plain_pictures=kind == "canny" or entry.preprocessor is not None,
                    licence=entry.licence,
                )
                for kind, entry in card.controls.items()
            ],
            refiner=card.refiner,
            refiner_start=card.refiner_start,
            trigger_words=card.trigger_words,
            max_loras=card.lora_limit,
            vram_gib=card.vram_gib,
            licence=card.licence,
            state=state,
        )


class ModelList(BaseModel):
    models: list[ModelOut]
    adapters: list[LoraOut] = Field(description="LoRAs that the caller may use with them.")
