"""The bytes of a device that a plan reckons with: what is held all the time, and what forwards take.

Text encoders and the VAE work beside the denoiser, on the engine's other lane, one call at a time. So the
peak is what is held, the denoiser's largest forward, and the larger of one encoding and one decoding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deployments.planning.part_plan import TEXT_ENCODERS, PartPlan
from deployments.protocol.card import Dtype, ModelCard
from deployments.protocol.memory_needs import MemoryNeeds

GIB = 2**30
MIB = 2**20
LORA_COPIES = 2  # as in the file, and stacked for a batch: docs/memory.md
WITH_GUIDANCE = ("sd", "sdxl", "ltx")  # families whose calls have two rows: with the prompt, and without it
# that make two calls, or one whatever the guidance
WITHOUT_GUIDANCE = ("flux", "flux2", "flux2_klein", "hunyuan_video", "qwen_image", "wan")


@dataclass(frozen=True, slots=True)
class PlannedBytes:
    """Bytes on the device."""

    weights: int = 0  # that stay on it, of this model
    others: int = 0  # of ControlNets, the refiner and models of the group beside it
    loras: int = 0  # of all slots
    prompts: int = 0  # the prompt cache
    steps: int = 0  # a forward of the denoiser with all rows of the plan
    auxiliary: int = 0  # meanwhile: one picture is decoded, or one prompt encoded
    dequantisation: int = 0  # of the denoiser's layers whose weights come from a GGUF file, one at a time

    @property
    def working(self) -> int:
        """What forwards take beside what is held."""
        return self.steps + self.auxiliary + self.dequantisation

    @property
    def peak(self) -> int:
        """All of it at the same time."""
        return self.weights + self.others + self.loras + self.prompts + self.working


def rows_of_call(card: ModelCard) -> int:
    """Rows of the smallest forward of the denoiser; of another family the most that it may have."""
    if card.family in WITH_GUIDANCE:
        return 2
    return 1 if card.family in WITHOUT_GUIDANCE or card.guidance.max <= 1 else 2


def row_bytes(needs: MemoryNeeds, dtype: Dtype, *, controlled: bool = False) -> int:
    """What a forward of the denoiser takes for each row. controlled: with the outputs of ControlNets."""
    row_gib = needs.row_gib + (needs.control_row_gib if controlled else 0.0)
    return int(row_gib * GIB * _width(dtype))


def lora_bytes(needs: MemoryNeeds, dtype: Dtype) -> int:
    """What a LoRA of rank 32 takes on the device."""
    return int(LORA_COPIES * needs.lora_mib * MIB * _width(dtype))


def decode_bytes(needs: MemoryNeeds, dtype: Dtype, *, tiled: bool) -> int:
    """What decoding one picture or video of the default size takes. dtype: of the VAE."""
    whole, tile = needs.decode_gib, needs.tiled_decode_gib
    return int((whole if not tiled or tile is None else min(tile, whole)) * GIB * _width(dtype))


def auxiliary_bytes(parts: Iterable[PartPlan], needs: MemoryNeeds, *, tiled: bool) -> int:
    """The larger of decoding one picture and encoding one prompt, with the weights that are copied for it,
    and with what it takes to bring a layer's weight into floats."""
    decoding, encoding = 0, 0
    for part in parts:
        copied = part.device_bytes - part.held_bytes
        if part.name == "vae":
            decoding = copied + part.workspace_bytes + decode_bytes(needs, part.dtype, tiled=tiled)
        elif part.name in TEXT_ENCODERS and part.placement != "cpu":
            copied += part.workspace_bytes
            encoding = max(encoding, copied + int(needs.encode_gib * GIB * _width(part.dtype)))
    return max(decoding, encoding)


def _width(dtype: Dtype) -> int:
    """Bytes of a value relative to 16 bits."""
    return 2 if dtype == "float32" else 1
