"""The ways to hold a model on a device, the best first: what fits on the highest rung is the plan.

Each rung takes less of the device than those above it, and costs more: time for each new prompt, then
pictures that differ a little, then time in every step. What a card sets explicitly leaves the rungs that
agree with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from deployments.planning.machine import Machine
from deployments.planning.part_plan import DENOISERS, TEXT_ENCODERS, Placement
from deployments.protocol.card import ModelCard, Quantisation, Serving

Forms = list[tuple[Quantisation | None, Quantisation | None]]  # of the denoiser, of the large text encoders

# a text encoder below this has nothing to save: CLIP-L, with 123 million parameters
SMALL_ENCODER = 200.0  # million parameters


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to hold a model."""

    denoiser: Placement = "device"
    encoders: Placement = "device"  # of the large text encoders
    denoiser_weights: Quantisation | None = None
    encoder_weights: Quantisation | None = None
    tiled: bool = False  # the VAE decodes in tiles
    with_others: bool = False  # ControlNets, the refiner and models of the group fit beside it


def rungs(card: ModelCard, machine: Machine) -> Iterator[Rung]:
    """All ways that the card allows on this machine, the best first."""
    serving = card.serving
    tilings = [False, True] if serving.vae_tiling == "auto" else [serving.vae_tiling]
    for denoiser, encoders in _forms(serving, machine):
        form = Rung(denoiser_weights=denoiser, encoder_weights=encoders)
        places = _whole_places(serving, machine)
        for with_others in (True, False):
            for tiled in tilings[:1] if with_others else tilings:
                for place in places:
                    yield replace(form, encoders=place, tiled=tiled, with_others=with_others)
    for form in _moving(serving, machine):
        for tiled in tilings:
            yield replace(form, tiled=tiled)


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
    if serving.offload == "text_encoders":
        return ["on_demand"]
    return [] if serving.offload == "sequential" else ["device", "on_demand"]


def _moving(serving: Serving, machine: Machine) -> Iterator[Rung]:
    """Ways in which the denoiser's weights are copied to the device in every step."""
    if not machine.is_gpu or serving.compile or serving.offload in ("none", "text_encoders"):
        return
    denoiser, encoders = _forms(serving, machine)[0]
    if serving.quantisation == "auto" and serving.offload == "auto":  # half the bytes to copy
        denoiser = encoders = _eight_bits(machine)
    if serving.offload == "balanced":
        yield Rung("streamed", "on_demand", denoiser, encoders)
    if serving.offload == "auto":
        yield Rung("streamed", "streamed", denoiser, encoders)
    if serving.offload in ("auto", "sequential"):
        yield Rung("sequential", "sequential", denoiser, encoders)
