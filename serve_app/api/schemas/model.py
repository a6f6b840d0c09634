"""Models and their limits, from which a client can build a form without knowing any model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Self

from pydantic import BaseModel, Field

from deployments.protocol.card import Guidance, Licence, ModelCard, References, Sizes, Steps, Videos
from deployments.protocol.request import Exactness
from serve_app.api.schemas.lora import LoraOut
from serve_app.api.state import ModelFailure


class ControlOut(BaseModel):
    """One type of control image that a model takes."""

    type: str = Field(examples=["canny"])
    plain_pictures: bool = Field(description="false: only control maps, sent with is_map: true.")
    licence: Licence


class ProofOut(BaseModel):
    """Batch sizes of a module's calls of one shape, by what a trial has shown on this machine."""

    module: str = Field(examples=["UNet2DConditionModel.forward"])
    shape: str = Field(description="Of one row of its first input, with its type.")
    call_rows: int = Field(description="Rows of one call, such as 2 with guidance in one call.")
    proven: list[int] = Field(description="They change no bit of a result.")
    refused: list[int] = Field(description="They change bits, or failed.")
    pending: list[int] = Field(description="Not tried yet.")


class PlanOut(BaseModel):
    """How a model runs, or would run, on a device."""

    summary: str = Field(examples=["int8 transformer, text_encoder_2 on demand: 20.4 GiB, 1 rows, 1 LoRAs"])
    device: str = Field(examples=["NVIDIA L4"])
    loaded: bool = Field(description="Whether a replica has it so; otherwise it would run like this.")
    refusal: str | None = Field(description="Why it cannot run on this device; null: it can.")
    dtype: str = Field(examples=["bfloat16"])
    quantised: dict[str, str] = Field(
        description="Form of the weights by part, if in fewer bits or of a GGUF file."
    )
    placed: dict[str, str] = Field(description="Place by part, of those that are not always on the device.")
    vae_tiling: bool
    whole_pixels: int | None = Field(
        description="Larger pictures, and videos times their frames, are decoded in tiles; null: none are."
    )
    rows: int | None = Field(description="Of one forward at the default size, at most.")
    lora_slots: int | None = Field(description="LoRAs of rank 32 on the device at a time.")
    peak_bytes: int | None = Field(description="Of the device; null: the card states no sizes.")
    host_bytes: int
    notes: list[str] = Field(description="What the plan changes in pictures or speed.")


class ModelFailureOut(BaseModel):
    """Why a model cannot serve, and when it is tried again."""

    kind: str = Field(examples=["model_failed"])
    message: str = Field(description="Cause and cure.")
    since: float | None = Field(description="Unix seconds of the first failure in a row.")
    tries: int | None
    retry_at: float | None = Field(description="Unix seconds; the first request from then on tries again.")


class ModelOut(BaseModel):
    """One model with its limits and defaults."""

    id: str
    name: str
    family: str = Field(description="Of its pipeline's class; unknown: before its weights are here.")
    description: str
    aliases: list[str] = Field(description="Other names a request may use.")
    tasks: list[str]
    steps: Steps
    guidance: Guidance
    sizes: Sizes
    videos: Videos | None = Field(description="Limits of the tasks t2v and i2v; null: it makes no videos.")
    references: References | None = Field(
        None, description="Limits of the task edit: reference images of one request, and pixels of each."
    )
    corrects: bool = Field(description="Steps and guidance out of range are corrected with a warning.")
    negative_prompt: bool
    max_images: int
    max_prompt_chars: int
    max_sequence_length: int | None
    schedulers: list[str]
    strength: float = Field(description="Default for an image to start from.")
    controls: list[ControlOut] = Field(description="Types of control image it takes.")
    refiner: str | None = Field(description="The model that continues when a request sets `refiner`.")
    refiner_start: float = Field(description="Fraction of the steps at which the refiner takes over.")
    trigger_words: list[str]
    max_loras: int = Field(description="LoRAs that one request may name; 0: none.")
    vram_gib: float
    licence: Licence
    exact: Exactness = Field(description="Of requests that do not ask for another; off: strict is refused.")
    proofs: list[ProofOut] | None = Field(
        description="What one of its replicas has proven; null: no replica has reported."
    )
    plan: PlanOut | None = Field(
        None,
        description="As one of its replicas reports it, else for the device that the card names; null: it "
        "names none.",
    )
    state: str = Field(
        description="ready; loading; idle: the first request starts it; failed: it could not be loaded; "
        "error: no replica of it starts; absent: not deployed.",
        examples=["ready"],
    )
    failure: ModelFailureOut | None = Field(
        None, description="Of a model that is failed or in error, or that no node can take."
    )

    @classmethod
    def of(
        cls,
        card: ModelCard,
        state: str,
        proofs: Sequence[Mapping[str, object]] | None = None,
        failure: ModelFailure | None = None,
        plan: Mapping[str, object] | None = None,
    ) -> Self:
        return cls(
            id=card.id,
            name=card.name,
            family=card.family or "unknown",
            description=card.description,
            aliases=card.aliases,
            tasks=card.tasks,
            steps=card.steps,
            guidance=card.guidance,
            sizes=card.sizes,
            videos=card.videos,
            references=card.references,
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
            exact=card.serving.exact,
            proofs=None if proofs is None else [ProofOut.model_validate(proof) for proof in proofs],
            plan=None if plan is None else PlanOut.model_validate(plan),
            state=state,
            failure=None if failure is None else ModelFailureOut.model_validate(asdict(failure)),
        )


class ModelList(BaseModel):
    models: list[ModelOut]
    adapters: list[LoraOut] = Field(description="LoRAs that the caller may use with them.")
