"""The model card: what a model is, needs and allows, as one YAML file per model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from deployments.protocol.errors import BadRequest
from deployments.protocol.gguf_file import GgufFile
from deployments.protocol.invalid_values import wrong_values
from deployments.protocol.memory_needs import MemoryNeeds
from deployments.protocol.request import (
    MAX_FPS,
    MAX_FRAMES,
    MAX_LORAS,
    MAX_REFERENCES,
    ControlType,
    Exactness,
    Strict,
    Task,
)
from deployments.protocol.yaml_file import read_mapping

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]
# of weights. int8, fp8: torchao, 8 bits per weight, computed in the part's dtype. fp8_dynamic: torchao,
# products of 8 bits with a scale per row. nf4: bitsandbytes, 4 bits. fp8_cast: diffusers' layerwise casting
Quantisation = Literal["int8", "fp8", "fp8_dynamic", "nf4", "fp8_cast"]
# see Videos.last_image
LastImage = Literal["optional", "required", "alone"]
Offload = Literal["none", "text_encoders", "text_encoders_on_cpu", "balanced", "sequential"]

FAMILY = r"^[a-z0-9][a-z0-9_]{0,63}$"
MODEL_ID = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class Steps(Strict):
    """How many denoising steps the model may run; min == max means a fixed number."""

    min: int = Field(ge=1)
    default: int
    max: int

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.min <= self.default <= self.max:
            raise ValueError("steps need min <= default <= max")
        return self


class Guidance(Strict):
    """The range of guidance_scale."""

    min: float = Field(ge=0)
    default: float
    max: float

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.min <= self.default <= self.max:
            raise ValueError("guidance needs min <= default <= max")
        return self


class Sizes(Strict):
    """Which widths and heights the model may be asked for, in pixels."""

    width: int  # default
    height: int  # default
    multiple: int = Field(16, ge=1)
    min: int = 256
    max: int = 2048
    max_pixels: int = 4_194_304
    max_aspect: float = 3.0  # longer side over shorter side

    @model_validator(mode="after")
    def _check_default(self) -> Self:
        for side in (self.width, self.height, self.min, self.max):
            if side % self.multiple:
                raise ValueError(f"{side} is not a multiple of {self.multiple}")
        if self.width * self.height > self.max_pixels:
            raise ValueError("the default size is over max_pixels")
        return self


class References(Strict):
    """Which reference pictures an edit may bring along, and how the model sees them."""

    max: int = Field(1, ge=1, le=MAX_REFERENCES)  # of one request
    max_pixels: int = Field(16_777_216, ge=1)  # of each, as it is sent
    max_aspect: float = Field(4.0, ge=1)  # longer side over shorter side
    # each is scaled to about so many, with its aspect ratio; None: the pipeline scales them as it was trained
    pixels: int | None = Field(None, ge=1)


class Videos(Strict):
    """Which videos the model may be asked for."""

    num_frames: int  # default
    fps: int = Field(ge=1, le=MAX_FPS)  # default: what the model was trained with
    min_frames: int = Field(1, ge=1)
    max_frames: int = Field(le=MAX_FRAMES)
    every: int = Field(
        1, ge=1
    )  # num_frames is every * k + 1: each of Wan's latents holds 4 frames, the first one 1
    max_frame_pixels: int  # width x height x frames
    framewise: bool = False  # a picture model: every frame is a picture on a path between two seeds
    # of i2v, whether the last frame may be given. optional: beside the first; required: with the first,
    # always; alone: with or without the first. None: it cannot
    last_image: LastImage | None = None

    @model_validator(mode="after")
    def _check_default(self) -> Self:
        for frames in (self.num_frames, self.min_frames, self.max_frames):
            if (frames - 1) % self.every:
                raise ValueError(f"{frames} frames are not a multiple of {self.every}, plus 1")
        if not self.min_frames <= self.num_frames <= self.max_frames:
            raise ValueError("videos need min_frames <= num_frames <= max_frames")
        if self.framewise and self.last_image is not None:
            raise ValueError("a frame-wise video takes no last frame; take last_image out")
        return self


class Licence(Strict):
    name: str
    url: str
    attribution: str = ""  # shown with the model where the licence requires it
    gated: bool = False  # must be accepted on the hub before a download
    commercial: bool = True


class Weights(Strict):
    """The place of the weights: a folder (relative to the repository), the URL of a folder that fsspec opens
    (s3://bucket/folder), or a hub id."""

    path: str | None = None
    repo: str | None = None
    revision: str = "main"
    variant: str | None = None  # e.g. "fp16": infix of the file names
    dtype: Dtype = "bfloat16"
    gguf: dict[str, GgufFile] = {}  # by component, such as "transformer": where its weights come from

    def __hash__(self) -> int:
        """Of a dict there is none."""
        place = self.path, self.repo, self.revision, self.variant, self.dtype
        return hash((*place, *sorted((name, file.name) for name, file in self.gguf.items())))

    @model_validator(mode="after")
    def _check_one_source(self) -> Self:
        if (self.path is None) == (self.repo is None):
            raise ValueError("weights need exactly one of path and repo")
        return self

    @property
    def is_remote(self) -> bool:
        """Whether the folder has to be fetched before it can be loaded."""
        return self.repo is not None or "://" in (self.path or "")

    @property
    def needs_fetch(self) -> bool:
        """Whether the folder or a GGUF file has to be fetched."""
        return self.is_remote or any(file.is_remote for file in self.gguf.values())


class ControlNet(Strict):
    """The ControlNet for one kind of control picture, loaded when a request first asks for it."""

    weights: Weights
    mode: int | None = Field(None, ge=0)  # FLUX union nets only: which of its modes this kind is
    preprocessor: Weights | None = None  # makes the map of a plain picture; canny needs none
    detector: Weights | None = None  # pose: finds the persons whose key points the preprocessor locates
    licence: Licence

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if any(one.gguf for one in (self.weights, self.preprocessor, self.detector) if one is not None):
            raise ValueError("gguf is for components of the model itself; take it out of controls")
        return self


class CardLora(Strict):
    """A LoRA that comes with a model."""

    id: str = Field(pattern=MODEL_ID)
    path: str  # a safetensors file; relative ones are under the repository
    trigger_words: list[str] = []
    description: str = ""
    licence: str = ""  # empty: the model's


class Serving(Strict):
    """Resources and limits of one replica; serve_config.yaml may override them."""

    num_gpus: float = Field(1.0, ge=0)  # a part of one, such as 0.5, is also that part of its memory
    num_cpus: float = 1.0
    memory_gib: float | None = Field(None, gt=0)  # of the device, at most; None: docs/memory.md
    accelerator_type: str | None = None  # one of ray.util.accelerators, such as "A100-80G"; None: any GPU
    slots: int = Field(16, ge=1)  # requests running at once on one replica
    max_rows: int | None = Field(
        None, ge=1, le=64
    )  # batch size of one forward, at most; None: docs/memory.md
    exact: Exactness = "prefer"  # of requests that do not ask for another: docs/engine.md
    max_wait_s: float | None = Field(None, gt=0)  # calls by handle that would wait longer are refused
    watchdog_s: float = Field(
        300.0, gt=0
    )  # a forward that takes longer counts as hung: the replica is replaced
    prompt_cache_mib: int = Field(256, ge=0)  # of prompt embeddings, per model
    group: str | None = None  # cards of one group share their replicas; the first listed sets the resources
    models_loaded: int = Field(
        3, ge=1
    )  # of a group at once on one replica; the least recently used is unloaded
    lora: Literal["shared", "dedicated", "none"] = (
        "shared"  # dedicated: LoRA requests have replicas of their own
    )
    lora_min_replicas: int | None = Field(None, ge=0)  # of the dedicated ones; None: as min_replicas
    adapters_on_device: int = Field(8, ge=1)  # slots; one in use is never evicted
    adapters_in_memory: int = Field(64, ge=1)  # converted, ready for the device
    adapter_memory_mib: int = Field(4096, ge=1)  # of them together; whichever limit is reached first
    adapter_disk_mib: int = Field(10_240, ge=0)  # LoRA files on the replica's disk
    warm_up: bool = True  # run one request before the replica is ready
    warm_up_sizes: list[tuple[int, int]] = []  # width and height of these; empty: the default size
    compile: bool = False  # torch.compile of the denoiser's repeated blocks, cached on the node
    # how it runs on the device: docs/machines.md. auto: as the plan for the device at hand says
    quantisation: Literal["auto", "none"] | Quantisation | dict[str, Literal["none"] | Quantisation] = "auto"
    offload: Literal["auto"] | Offload = "auto"
    attention: str | None = None  # a backend of diffusers, such as "flash"; None: torch's own choice
    vae_tiling: Literal["auto"] | bool = "auto"
    vae_slicing: Literal["auto"] | bool = "auto"
    channels_last: Literal["auto"] | bool = "auto"  # memory format of UNets and VAEs
    prefetch: bool = True  # fetch remote weights to every GPU node before a replica starts there
    min_replicas: int = Field(0, ge=0)
    max_replicas: int = Field(1, ge=1)
    autoscaling: dict[
        str, float
    ] = {}  # parameters of the policy that differ from its defaults: docs/scaling.md
    job_timeout_s: float = 600.0

    @model_validator(mode="before")
    @classmethod
    def _read_old_keys(cls, values: Any) -> Any:
        return with_current_keys(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _check_num_gpus(self) -> Self:
        if self.num_gpus > 1:
            raise ValueError(
                f"num_gpus: {self.num_gpus:g} would leave all but one of the GPUs idle, because no model is "
                "split over several; write num_gpus: 1, and max_replicas for more GPUs"
            )
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> Self:
        if self.compile and not self.warm_up:
            raise ValueError("compile needs warm_up, or the first requests would wait for the compiler")
        return self


def with_current_keys(serving: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `serving` in which `deterministic`, the name of a switch before `exact`, is replaced by it.

    True was what `strict` is now. Raises ValueError for another value, and where both keys are there.
    """
    current = dict(serving)
    if "deterministic" not in current:
        return current
    deterministic = current.pop("deterministic")
    if "exact" in current:
        raise ValueError("deterministic is the old name of exact, which is there too; leave it out")
    if not isinstance(deterministic, bool):
        raise ValueError("deterministic is the old name of exact; write exact: prefer, strict or off")
    current["exact"] = "strict" if deterministic else "off"
    logger.warning(
        "a model card or a Serve config says `deterministic: %s`; that is now `exact: %s`",
        str(deterministic).lower(),
        current["exact"],
    )
    return current


def _known_tasks(tasks: list[str]) -> list[str]:
    for task in tasks:
        if task not in tuple(Task):
            raise ValueError(f"unknown task {task!r}")
    return tasks


class ModelCard(Strict):
    """One model as the service offers it. An unknown key in a YAML file is an error that names it."""

    id: str = Field(pattern=MODEL_ID)
    name: str
    family: str | None = Field(None, pattern=FAMILY)  # a word for people; None: that of its pipeline's class
    description: str = ""
    aliases: list[str] = []  # other names a request may use, such as the hub id
    weights: Weights
    tasks: Annotated[list[str], AfterValidator(_known_tasks)]
    steps: Steps
    guidance: Guidance
    sizes: Sizes
    references: References | None = None  # what task edit allows
    videos: Videos | None = None  # what tasks t2v and i2v allow
    corrects: bool = False  # out-of-range steps and guidance are corrected with a warning (schnell)
    negative_prompt: bool = True
    schedulers: list[str] = ["auto"]  # names of pipelines/noise_schedulers.py
    max_sequence_length: int | None = None  # text tokens; fixed per model so that batches match
    max_prompt_chars: int = Field(4_000, le=32_000)
    max_images: int = Field(4, ge=1, le=16)
    strength: float = Field(0.8, ge=0, le=1)  # default for img2img and inpainting
    trigger_words: list[str] = []
    controls: dict[ControlType, ControlNet] = {}  # control pictures it takes, by kind
    max_loras: int = Field(MAX_LORAS, ge=0, le=MAX_LORAS)  # of one request; 0: takes none
    adapters: list[CardLora] = []  # LoRAs that come with it
    refiner: str | None = None  # id of the card that refines this model's pictures
    refiner_start: float = Field(0.8, gt=0, lt=1)  # part of the steps at which the refiner takes over
    vram_gib: float = 0.0  # for the weights and one picture of the default size; 0: runs on a CPU
    memory: MemoryNeeds | None = None  # by part, for the plan of a device; None: not known
    licence: Licence
    price_per_device_second: float = Field(0.0, ge=0)  # in the operator's currency, for usage and budgets
    serving: Serving = Serving()

    @property
    def all_weights(self) -> list[Weights]:
        """Its own first, then those of its ControlNets, preprocessors and detectors; each once."""
        nets = self.controls.values()
        annotators = [weights for net in nets for weights in (net.preprocessor, net.detector) if weights]
        every = [self.weights, *(net.weights for net in nets), *annotators]
        return [weights for index, weights in enumerate(every) if weights not in every[:index]]

    @property
    def lora_limit(self) -> int:
        """How many LoRAs one request may name; 0: none."""
        return self.max_loras if self.serving.lora != "none" else 0

    @model_validator(mode="after")
    def _check_compiled_task(self) -> Self:
        if self.serving.compile and Task.t2i not in self.tasks:
            raise ValueError("compile needs the task t2i, which warms it up; take compile out of serving")
        return self

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        if (Task.edit in self.tasks) != (self.references is not None):
            raise ValueError("task edit needs the limits in references, and they need the task edit")
        return self

    @model_validator(mode="after")
    def _check_video_limits(self) -> Self:
        if {Task.t2v, Task.i2v} & set(self.tasks) and self.videos is None:
            raise ValueError("tasks t2v and i2v need the limits in videos")
        return self

    @model_validator(mode="after")
    def _check_adapter_ids(self) -> Self:
        if len({adapter.id for adapter in self.adapters}) < len(self.adapters):
            raise ValueError("adapters need ids that differ")
        return self

    @model_validator(mode="after")
    def _check_pose(self) -> Self:
        pose = self.controls.get("pose")
        if pose is not None and (pose.preprocessor is None) != (pose.detector is None):
            raise ValueError("controls.pose needs both preprocessor and detector, or neither")
        return self


def load_cards(directory: Path) -> dict[str, ModelCard]:
    """Every card under `directory`, by id. Raises BadRequest naming the file and the key at fault."""
    if not directory.is_dir():
        raise BadRequest(f"there is no folder {directory} with model cards; correct WEFT_CARDS_DIR")
    cards: dict[str, ModelCard] = {}
    for path in sorted(directory.glob("*.yaml"), key=lambda path: path.stem):
        card = load_card(path)
        if card.id in cards:
            raise BadRequest(f"{path}: a card with id {card.id!r} exists already; ids are unique")
        cards[card.id] = card
    return cards


def load_card(path: Path) -> ModelCard:
    """The card in one YAML file. Raises BadRequest naming the file and the key at fault."""
    try:
        return ModelCard.model_validate(read_mapping(path))
    except ValidationError as error:
        raise BadRequest(
            f"{path} is not a valid model card: {wrong_values(error, ModelCard.model_fields)}"
        ) from None
