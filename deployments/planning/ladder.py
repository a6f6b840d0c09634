"""The ways to hold a model on a device, the best first: what fits on the highest rung is the plan.

Each rung takes less of the device than those above it, and costs more: time for each new prompt, then
pictures that differ a little, then time in every step. What a card sets explicitly leaves the rungs that
agree with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from deployments.planning.machine import Machine
from deployments.planning.part_plan import DENOISERS, TEXT_ENCODERS, Placement
from deployments.protocol.card import ModelCard, Quantisation, Serving

Forms = list[tuple[Quantisation | None, Quantisation | None]]  # of the denoiser, of the large text encoders

# a text encoder below this has nothing to save: CLIP-L, with 123 million parameters
SMALL_ENCODER = 200.0  # million parameters


# of `offload`, by the place of the text encoders: those settings leave the denoiser where it is
ENCODERS_ALONE: Mapping[str, Placement] = {"text_encoders": "on_demand", "text_encoders_on_cpu": "cpu"}
# families whose LoRAs change text encoders, which they cannot do on the CPU
LORAS_FOR_ENCODERS = ("sd", "sdxl")


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to hold a model."""

    denoiser: Placement = "device"
    encoders: Placement = "device"  # of the large text encoders
    denoiser_weights: Quantisation | None = None
    encoder_weights: Quantisation | None = None
    vae: Placement = "device"
    tiled: bool = False  # it decodes in tiles
    with_others: bool = False  # ControlNets, the refiner and models of the group fit beside it


def rungs(card: ModelCard, machine: Machine) -> Iterator[Rung]:
    """All ways that the card allows on this machine, the best first."""
    serving = card.serving
    tilings = [False, True] if serving.vae_tiling == "auto" else [serving.vae_tiling]
    forms, places = _forms(serving, machine), _whole_places(serving, machine)
    for (denoiser, encoders), following in zip(forms, [*forms[1:], None], strict=True):
        form = Rung(denoiser_weights=denoiser, encoder_weights=encoders)
        for with_others in (True, False):
            for tiled in tilings[:1] if with_others else tilings:
                for place in places:
                    yield replace(form, encoders=place, tiled=tiled, with_others=with_others)
        is_last = following is None or (following[0] == "nf4") != (denoiser == "nf4")
        if is_last and _may_encode_on_cpu(card, machine):
            for tiled in tilings:
                yield Rung(denoiser_weights=denoiser, encoders="cpu", tiled=tiled)
    for form in _moving(serving, machine):
        for tiled in tilings:
            yield replace(form, tiled=tiled)


def _may_encode_on_cpu(card: ModelCard, machine: Machine) -> bool:
    """Whether text encoders may compute on the CPU, where nothing else fits but weights of fewer bits: they
    take seconds for a new prompt there, and pictures are those of the weights as they are."""
    by_loras = card.lora_limit > 0 and card.family in LORAS_FOR_ENCODERS
    return machine.is_gpu and card.serving.offload == "auto" and not by_loras


def weights_of(name: str, million: float, rung: Rung, serving: Serving) -> Quantisation | None:
    """The form of a part's weights. million: its parameters."""
    wanted = serving.quantisation
    if isinstance(wanted, dict):
        explicit = wanted.get(name, "none")
        return None if explicit == "none" else explicit
    if name in DENOISERS:
        return rung.denoiser_weights
    return rung.encoder_weights if _is_large_encoder(name, million) else None


def placement_of(name: str, million: float, rung: Rung) -> Placement:
    """Where a part is. million: its parameters."""
    if name in DENOISERS:
        return rung.denoiser
    if name == "vae":
        return rung.vae
    return rung.encoders if _is_large_encoder(name, million) else "device"


def _is_large_encoder(name: str, million: float) -> bool:
    """Whether it is a text encoder that is worth another place or form than the whole on the device."""
    return name in TEXT_ENCODERS and million >= SMALL_ENCODER


def _eight_bits(machine: Machine) -> Quantisation:
    """The form of 8 bits that the device multiplies best."""
    return "fp8" if machine.has_fp8 else "int8"


def _forms(serving: Serving, machine: Machine) -> Forms:
    """Forms of the denoiser's and the text encoders' weights."""
    wanted, eight = serving.quantisation, _eight_bits(machine)
    if wanted == "none" or isinstance(wanted, dict):
        return [(None, None)]
    if wanted != "auto":
        return [(wanted, None)]  # a form that a card names alone is the denoisers'
    if serving.offload in ("balanced", "sequential"):  # the weights move instead
        return [(None, None)]
    forms: Forms = [
        (None, None),
        (eight, None),
        (eight, eight),
    ]
    if machine.kind != "mps":  # for which bitsandbytes has no kernels
        forms += [("nf4", eight), ("nf4", "nf4")]
    if serving.compile:  # which takes plain weights only
        return [(None, None), (None, eight)]
    return forms


def _whole_places(serving: Serving, machine: Machine) -> list[Placement]:
    """Where the large text encoders may be while the whole denoiser is on the device."""
    if not machine.is_gpu or serving.offload == "none":  # one memory: a copy elsewhere in it saves nothing
        return ["device"]
    if serving.offload in ENCODERS_ALONE:
        return [ENCODERS_ALONE[serving.offload]]
    return [] if serving.offload == "sequential" else ["device", "on_demand"]


def _moving(serving: Serving, machine: Machine) -> Iterator[Rung]:
    """Ways in which the denoiser's weights are copied to the device in every step."""
    if not machine.is_gpu or serving.compile or serving.offload in ("none", *ENCODERS_ALONE):
        return
    denoiser, encoders = _forms(serving, machine)[0]
    if serving.quantisation == "auto" and serving.offload == "auto":  # half the bytes to copy
        denoiser = encoders = _eight_bits(machine)
    if serving.offload == "balanced":
        yield Rung("streamed", "on_demand", denoiser, encoders)
    if serving.offload == "auto":
        yield Rung("streamed", "streamed", denoiser, encoders)
    if serving.offload in ("auto", "sequential"):
        yield Rung("sequential", "sequential", denoiser, encoders, vae="on_demand")
