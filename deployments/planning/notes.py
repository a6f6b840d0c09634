"""A sentence for each thing in a plan that changes pictures or speed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from deployments.planning.fitting import Fitted
from deployments.planning.machine import Machine
from deployments.planning.others import Other
from deployments.planning.part_plan import CONVOLUTIONAL, DENOISERS, PartPlan
from deployments.planning.refusal import gib
from deployments.protocol.card import Dtype, ModelCard

BITS = {"int8": 8, "fp8": 8, "fp8_dynamic": 8, "fp8_cast": 8, "nf4": 4}


def _dtype_notes(card: ModelCard, dtype: Dtype, machine: Machine) -> Iterator[str]:
    """What the device computes in instead of what the card says."""
    if dtype != card.weights.dtype:
        yield f"{machine.name} does not compute in {card.weights.dtype}: {dtype}, and float32 in the VAE"


def _part_notes(parts: Iterable[PartPlan]) -> Iterator[str]:
    """What the form and the place of the weights change."""
    for part in parts:
        yield from _gguf_notes(part)
        if part.quantisation is not None:
            bits = BITS[part.quantisation]
            form = f"weights of {bits} bits ({part.quantisation})"
            yield f"{part.name} has {form}: pictures differ from those of {part.dtype}"
        if part.placement == "on_demand":
            use = "encoding and decoding" if part.name == "vae" else "each new prompt"
            yield f"{part.name} is copied to the device for {use} ({gib(part.weight_bytes)})"
        elif part.placement == "cpu":
            yield f"{part.name} computes on the CPU for each new prompt: that may take seconds, without LoRAs"
        elif part.placement in ("streamed", "sequential"):
            yield _moving_note(part)


def _gguf_notes(part: PartPlan) -> Iterator[str]:
    """What weights from a GGUF file change."""
    file = part.gguf
    if file is None:
        return
    if not file.is_read:
        yield (
            f"{part.name} comes from {file.name}, which is not on this machine: its bytes are those that the "
            "card states"
        )
    if not file.is_exact:
        yield (
            f"{part.name} has the weights of a GGUF file ({file.form or file.name}): pictures differ from "
            f"those of {part.dtype}, and each layer's weight is brought into {part.dtype} whenever it "
            f"computes ({gib(part.workspace_bytes)}): slower"
        )


def _moving_note(part: PartPlan) -> str:
    each = "step" if part.name in DENOISERS else "new prompt"
    if part.placement == "sequential":
        return f"{part.name} is copied layer by layer in each {each} ({gib(part.weight_bytes)}): very slow"
    moving = part.weight_bytes - part.device_bytes
    kept = f"{part.resident_blocks} blocks of {part.name} stay on the device"
    return f"{kept}, the others are copied in each {each} (about {gib(moving)}): slower"


def notes_of(
    card: ModelCard,
    machine: Machine,
    dtype: Dtype,
    fitted: Fitted,
    beside: Sequence[Other],
    whole_pixels: int | None,
    *,
    channels_last: bool,
) -> tuple[str, ...]:
    """All that the plan changes, and what does not fit beside the model.

    whole_pixels, channels_last: of a Plan.
    """
    return (
        *_source_notes(card),
        *_dtype_notes(card, dtype, machine),
        *_part_notes(fitted.parts),
        *_tiling_notes(card, fitted, whole_pixels),
        *_layout_notes(fitted.parts, channels_last=channels_last),
        *_other_notes(fitted, machine, beside),
    )


def _source_notes(card: ModelCard) -> Iterator[str]:
    if card.memory is not None and card.memory.from_files:
        yield (
            "the card states no memory: sizes of weights are those in the headers of its files, and what "
            "forwards take is reckoned from the size of pictures and videos"
        )


def _tiling_notes(card: ModelCard, fitted: Fitted, whole_pixels: int | None) -> Iterator[str]:
    if fitted.rung.tiled:
        yield "the VAE decodes in tiles: pictures differ slightly from those decoded whole"
    elif whole_pixels is not None:
        in_video = card.videos is not None and not card.videos.framewise
        what = f"{'videos' if in_video else 'pictures'} of more than {whole_pixels / 1e6:.1f} million pixels"
        frames = " in all frames" if in_video else ""
        yield f"{what}{frames} are decoded in tiles and differ slightly from those decoded whole"


def _layout_notes(parts: Iterable[PartPlan], *, channels_last: bool) -> Iterator[str]:
    if found := [part.name for part in parts if channels_last and part.name in CONVOLUTIONAL]:
        yield (
            f"convolutions of {' and '.join(found)} lie by pixel (channels_last), which GPUs compute faster "
            "in 16 bits; pictures differ by rounding"
        )


def _other_notes(fitted: Fitted, machine: Machine, beside: Sequence[Other]) -> Iterator[str]:
    """What may be loaded beside the model, where not all of it fits at a time."""
    if fitted.rung.with_others or machine.limit_bytes is None:
        return
    free = machine.limit_bytes - fitted.least.peak
    for other in beside:
        how = "fits beside it alone" if other.bytes <= free else "does not fit beside it"
        yield f"{other.what} ({gib(other.bytes)}) {how}"
