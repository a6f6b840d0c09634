"""Why a model cannot run on a machine as its card asks for, with the bytes and what would change it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from deployments.planning.device_limit import GIB
from deployments.planning.fitting import Fitted
from deployments.planning.gpus import GPUS
from deployments.planning.machine import Machine
from deployments.planning.part_plan import DENOISERS, PartPlan
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import ModelFailed, OutOfMemory, WeftError

LEFT_TO_THE_PLAN = {"quantisation": "auto", "offload": "auto", "vae_tiling": "auto"}  # of `serving`


@dataclass(frozen=True, slots=True)
class Refusal:
    """kind: out_of_memory, or card where what `serving` asks for does not work on this machine."""

    kind: Literal["out_of_memory", "card"]
    message: str

    def error(self) -> WeftError:
        """What ends the loading of the model."""
        return OutOfMemory(self.message) if self.kind == "out_of_memory" else ModelFailed(self.message)


def contradiction(card: ModelCard, machine: Machine) -> Refusal | None:
    """What the card asks for that this kind of device cannot do; None: nothing."""
    wanted = card.serving.quantisation
    for name, file in card.weights.gguf.items():
        if (asked := _asked_form(card, name)) is not None:
            cause = f"serving.quantisation asks for {asked} in {name}, whose weights come from {file.name}"
            return _card(card, machine, cause, f"take {name} out of quantisation, or out of weights.gguf")
    forms: set[str] = {*wanted.values()} if isinstance(wanted, dict) else {wanted}
    if machine.kind == "mps" and forms & {"fp8", "fp8_dynamic", "fp8_cast", "nf4"}:
        return _card(card, machine, f"quantisation {_shown(forms)} does not run on it", "write int8 or auto")
    if machine.kind != "mps" and "fp8_dynamic" in forms and not machine.has_fp8:
        return _card(card, machine, "it does not multiply 8-bit floats", "write fp8, int8 or auto")
    return None


def uncompilable(card: ModelCard, machine: Machine, parts: Iterable[PartPlan]) -> Refusal | None:
    """Why a denoiser of this plan cannot be compiled as the card asks; None: it can, or need not be.

    Code for weights that move would be compiled again in each forward, and libraries that quantise have
    layers of their own.
    """
    for part in parts if card.serving.compile else ():
        if part.name not in DENOISERS:
            continue
        if part.form is not None:
            cause = f"compile: true, and {part.form} weights of the {part.name}"
            return _card(card, machine, cause, "take compile out, or leave the denoiser as it is")
        if part.placement != "device":
            cause = f"compile: true, and weights of the {part.name} that are {part.placement}"
            return _card(card, machine, cause, "take compile out, or write offload: none")
    return None


def _asked_form(card: ModelCard, part: str) -> str | None:
    """The form that the card itself asks for in this part; None: none."""
    wanted = card.serving.quantisation
    if isinstance(wanted, dict):
        asked = wanted.get(part, "none")
    else:
        asked = wanted if part in DENOISERS and wanted != "auto" else "none"
    return None if asked == "none" else asked


def too_large(
    card: ModelCard, machine: Machine, least: Fitted | None, unasked: Fitted | None, on_host: Fitted | None
) -> Refusal:
    """No way to hold the model fits.

    least: the one that takes least of the device; None: the card's settings leave none. unasked: one that
    fits when quantisation, offload and vae_tiling are left to the plan. on_host: one that fits when the host
    has memory for it. None: there is none.
    """
    if least is None:
        return _card(
            card, machine, "offload and quantisation leave no way to hold it", "set one of them to auto"
        )
    needed = (
        f"{card.id} needs {gib(least.bytes.peak)} of the memory of {machine.name} even with {_way(least)}"
    )
    there = "" if machine.limit_bytes is None else f", and {gib(machine.limit_bytes)} are there"
    return Refusal("out_of_memory", f"{needed}{there}; {_cure(card, least, unasked, on_host)}")


def _asks_for_more(card: ModelCard) -> bool:
    """Whether the card itself sets what could be left to the plan."""
    return any(getattr(card.serving, key) != value for key, value in LEFT_TO_THE_PLAN.items())


def gib(size_bytes: float) -> str:
    """Bytes for a reader: "10.6 GiB"."""
    return f"{size_bytes / GIB:.1f} GiB"


def _way(fitted: Fitted) -> str:
    """The form and place of the weights, in words."""
    forms = {part.form for part in fitted.parts if part.form is not None}
    rung = fitted.rung
    words = [f"{'/'.join(sorted(forms))} weights" if forms else "weights as they are"]
    if rung.denoiser == "streamed":
        words.append("copied block by block")
    elif rung.denoiser == "sequential":
        words.append("copied layer by layer")
    elif rung.encoders != "device":
        words.append("text encoders on the CPU" if rung.encoders == "cpu" else "text encoders on demand")
    if rung.tiled:
        words.append("decoding in tiles")
    return ", ".join(words)


def _cure(card: ModelCard, least: Fitted, unasked: Fitted | None, on_host: Fitted | None) -> str:
    """What would make it fit."""
    cures = []
    if unasked is not None:
        changes = ["take compile out of its card"] if card.serving.compile else []
        if _asks_for_more(card):
            changes.append("set quantisation, offload and vae_tiling of its card to auto")
        cures.append(f"{' and '.join(changes)} (then {_way(unasked)} fit)")
    if on_host is not None:
        cures.append(
            f"use more memory for the host, where {gib(on_host.host_bytes)} of weights would be kept"
        )
    limits = {
        gpu.full_name: machine.limit_bytes
        for gpu in GPUS.values()
        if (machine := gpu.machine()).is_gpu and machine.limit_bytes is not None
    }
    larger = [(limit, name) for name, limit in limits.items() if limit >= least.bytes.peak]
    if larger:
        cures.append(f"use a GPU such as {min(larger)[1]}")
    if 0 < card.serving.num_gpus < 1:
        cures.append("give it a whole GPU (num_gpus: 1)")
    working = least.bytes.working
    if working > least.bytes.peak / 2:
        what = "size or number of frames" if card.videos is not None else "size"
        cures.append(f"set a smaller default {what} in the card ({gib(working)} are for one result)")
    return ", or ".join(cures) or "no GPU that is known here has so much"


def _card(card: ModelCard, machine: Machine, cause: str, cure: str) -> Refusal:
    return Refusal("card", f"{card.id} cannot run on {machine.name} as its card says: {cause}; {cure}")


def _shown(forms: set[str]) -> str:
    return "/".join(sorted(forms))
