"""What a model needs of a device's memory, as facts of its architecture: `memory` of a card."""

from __future__ import annotations

from pydantic import Field

from deployments.protocol.request import Strict


class Blocks(Strict):
    """Repeated blocks of equal size."""

    count: int = Field(ge=1)
    parameters: float = Field(gt=0)  # of each, in millions


class PartNeeds(Strict):
    """The weights of one component of a pipeline. Parameters are in millions, buffers included."""

    parameters: float = Field(gt=0)
    linear: float = Field(0.0, ge=0, le=1)  # fraction of them in weights of Linear layers: what is quantised
    blocks: list[Blocks] = []  # in the order in which they compute, as group offload copies them
    largest_layer: float = Field(0.0, ge=0)  # parameters of the largest layer
    float32: float = Field(0.0, ge=0, le=1)  # fraction that transformers keeps in float32 instead of float16


class MemoryNeeds(Strict):
    """Of one model. Bytes of activations are those in a dtype of 16 bits at the card's default size."""

    parts: dict[str, PartNeeds]  # by name of the component, such as "text_encoder_2"
    controlnet: PartNeeds | None = None  # each net of the card's `controls`
    row_gib: float = Field(gt=0)  # a forward of the denoiser takes for each of its rows
    # outputs of ControlNets for each row: a request has those of all its nets added, a forward of several
    # requests a copy beside them
    control_row_gib: float = Field(0.0, ge=0)
    encode_gib: float = Field(0.0, ge=0)  # the largest text encoder takes for one prompt
    decode_gib: float = Field(gt=0)  # the VAE takes for one picture or video
    tiled_decode_gib: float | None = Field(None, gt=0)  # with vae_tiling; None: it saves nothing
    from_files: bool = False  # not stated by the card: reckoned by planning/file_needs.py
    lora_mib: float = Field(0.0, ge=0)  # factors of a LoRA of rank 32 on all Linear layers of the denoiser
