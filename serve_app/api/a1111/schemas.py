"""Bodies of /sdapi/v1/txt2img and img2img. Keys that cannot change the image are ignored, as A1111 does."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from deployments.protocol.request import MAX_FEATHER, MAX_GROW
from serve_app.api.schemas.body import NullableFields
from serve_app.api.schemas.files import ImageBytes, ImageList
from serve_app.api.schemas.numbers import Int, Seed

MAX_IMAGES = 16  # of one call: n_iter x batch_size
MAX_SCALE = 4.0


class A1111Body(NullableFields):
    """What any call of this dialect may hold; keys without a field are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


class GenerationBody(A1111Body):
    """The fields that txt2img and img2img share."""

    prompt: str = Field("", description="May hold <lora:name:weight>.")
    negative_prompt: str = ""
    seed: Seed = None
    subseed_strength: float = 0.0
    steps: Int | None = Field(None, ge=1, le=1000)
    cfg_scale: float | None = Field(None, ge=0, le=100)
    width: Int | None = Field(None, ge=1, le=16_384)
    height: Int | None = Field(None, ge=1, le=16_384)
    sampler_name: str | None = Field(None, max_length=100)
    sampler_index: str | None = Field(None, max_length=100, description="Another name for sampler_name.")
    scheduler: str | None = Field(None, max_length=100, description="Noise schedule, such as Karras.")
    batch_size: Int = Field(1, ge=1, le=MAX_IMAGES)
    n_iter: Int = Field(1, ge=1, le=MAX_IMAGES)
    styles: list[str] = Field([], max_length=100)
    restore_faces: bool = False
    tiling: bool = False
    denoising_strength: float | None = Field(None, ge=0, le=1)
    refiner_checkpoint: str | None = Field(None, max_length=200)
    refiner_switch_at: float | None = None
    override_settings: dict[str, Any] = Field({}, max_length=100, description="sd_model_checkpoint counts.")
    script_name: str | None = Field(None, max_length=100)
    alwayson_scripts: dict[str, Any] = Field({}, max_length=100, repr=False, description="ControlNet counts.")
    send_images: bool = True
    force_task_id: str | None = Field(
        None, max_length=100, description="A name of the call, for request_id of /sdapi/v1/progress."
    )


class TextToImageBody(GenerationBody):
    """Body of /sdapi/v1/txt2img."""

    enable_hr: bool = Field(False, description="Enlarge the image, and draw its details anew.")
    hr_scale: float = Field(2.0, ge=1, le=MAX_SCALE)
    hr_resize_x: Int = Field(0, ge=0, le=16_384)
    hr_resize_y: Int = Field(0, ge=0, le=16_384)
    hr_upscaler: str | None = Field(None, max_length=100)
    hr_second_pass_steps: Int = Field(0, ge=0, le=1000, description="0: as many as `steps`.")


class ImageToImageBody(GenerationBody):
    """Body of /sdapi/v1/img2img."""

    init_images: ImageList = Field([], max_length=1, repr=False)
    mask: ImageBytes | None = Field(None, repr=False, description="White is drawn anew.")
    mask_blur: Int = Field(4, ge=0, le=MAX_FEATHER)
    inpainting_fill: Int = Field(1, ge=0, le=3)
    inpaint_full_res: bool = False
    inpaint_full_res_padding: Int = Field(0, ge=0, le=MAX_GROW)
    inpainting_mask_invert: bool = False
    resize_mode: Int = Field(0, ge=0, le=3)


class ControlUnit(A1111Body):
    """One unit of alwayson_scripts.controlnet.args."""

    enabled: bool = True
    image: ImageBytes | dict[str, Any] | None = Field(None, repr=False)
    input_image: ImageBytes | None = Field(None, repr=False)
    module: str = Field("none", max_length=100)
    model: str = Field("none", max_length=200)
    weight: float = Field(1.0, ge=0, le=2)
    guidance_start: float = Field(0.0, ge=0, le=1)
    guidance_end: float = Field(1.0, ge=0, le=1)
    control_mode: str | int = "Balanced"


class ImagesOut(A1111Body):
    """A1111's answer."""

    images: list[str] = Field(description="PNG files as base64.")
    parameters: dict[str, Any]
    info: str = Field(description="JSON: seeds, prompts, sizes, infotexts, and the warnings of Weft.")
