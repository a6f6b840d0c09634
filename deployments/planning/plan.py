"""The plan of a model on a device: which dtype, form and place each of its parts has, and the bytes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from deployments.planning.account import PlannedBytes
from deployments.planning.fitting import Fitted, Fitting, dtype_of_part
from deployments.planning.gguf_needs import GgufNeeds, gguf_needs
from deployments.planning.ladder import ENCODERS_ALONE
from deployments.planning.machine import Machine
from deployments.planning.notes import notes_of
from deployments.planning.others import others_beside
from deployments.planning.part_plan import DENOISERS, DTYPE_BYTES, TEXT_ENCODERS, PartPlan, Placement
from deployments.planning.refusal import (
    LEFT_TO_THE_PLAN,
    Refusal,
    contradiction,
    too_large,
    uncompilable,
)
from deployments.planning.tiling import whole_pixels
from deployments.protocol.card import Dtype, ModelCard, Quantisation, Serving
from deployments.protocol.errors import ModelFailed

__all__ = ["DENOISERS", "TEXT_ENCODERS", "PartPlan", "Placement", "Plan", "everything_on_device", "plan_of"]


DOES_NOT_SEEM_TO_FIT = (
    "it does not seem to fit in any form: sizes are those in the headers of its files, and what forwards "
    "take is reckoned from the default size; state memory in its card"
)
NOTHING_RECKONED = (
    "bytes are not reckoned: its card states no memory, and its files are not here yet or do not have them; "
    "it is loaded as the card says, and refused if its weights do not fit"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How one model runs on one device."""

    dtype: Dtype  # of parts that `parts` does not name
    parts: tuple[PartPlan, ...] = ()
    attention: str | None = None  # backend of diffusers' set_attention_backend; None: torch's own choice
    vae_tiling: bool = False
    whole_pixels: int | None = None  # what has more, a video times frames, is decoded in tiles; None: nothing
    vae_slicing: bool = False
    channels_last: bool = False  # memory format of UNets and VAEs
    rows: int | None = None  # of one forward at the default size, at most; None: not reckoned
    lora_slots: int | None = None  # LoRAs of rank 32 on the device at a time; None: not reckoned
    planned: PlannedBytes | None = None  # on the device; None: not reckoned
    working_bytes: int | None = None  # for one picture, with what is copied for it; None: not reckoned
    host_bytes: int = 0  # of weights that are kept in memory of the host
    notes: tuple[str, ...] = ()  # a sentence for each thing that changes pictures or speed
    refusal: Refusal | None = None  # why the model cannot run here; None: it can

    def tiles(self, pixels: int) -> bool:
        """Whether a picture of so many pixels, or a video of so many in all frames, is decoded in tiles."""
        return self.vae_tiling or (self.whole_pixels is not None and pixels > self.whole_pixels)

    def part(self, name: str) -> PartPlan:
        """The plan of this component; one that is not named is on the device in the model's dtype."""
        return next((part for part in self.parts if part.name == name), PartPlan(name, self.dtype))


def plan_of(card: ModelCard, machine: Machine, others: Iterable[ModelCard] = ()) -> Plan:
    """The plan of the card's model on this machine.

    others: cards that may be loaded beside it, the refiner's and those of its group.
    Where the device has no limit or the card no `memory`, everything is on the device unless the card says
    otherwise, and no bytes are reckoned.
    """
    as_written = _as_written(card, machine)
    refusal = contradiction(card, machine)
    gguf: Mapping[str, GgufNeeds] = {}
    try:
        gguf = gguf_needs(card.weights, DTYPE_BYTES[as_written.dtype])
    except ModelFailed as error:
        refusal = refusal or Refusal("card", error.message)
    as_written = _with_files(as_written, gguf)
    refusal = refusal or uncompilable(card, machine, as_written.parts)
    if refusal is not None:
        return replace(as_written, refusal=refusal)
    unknown = [needs.name for needs in gguf.values() if needs.weight_bytes is None]
    if unknown and card.memory is not None and machine.limit_bytes is not None:
        cure = "write gib beside it in the card, or fetch it"
        notes = tuple(f"bytes are not reckoned: the size of {name} is not known; {cure}" for name in unknown)
        return replace(as_written, notes=notes)
    if card.memory is None or machine.limit_bytes is None:
        return as_written if machine.limit_bytes is None else replace(as_written, notes=(NOTHING_RECKONED,))
    beside = others_beside(card, as_written.dtype, others)
    others_bytes = sum(other.bytes for other in beside)
    fitting = Fitting(card, card.memory, machine, as_written.dtype, others_bytes, gguf)
    fitted = fitting.best()
    if fitted is None and card.memory.from_files:  # no guess refuses it; its bytes may, as it is loaded
        return replace(as_written, notes=(DOES_NOT_SEEM_TO_FIT,))
    if fitted is None:
        on_host = replace(fitting, machine=replace(machine, host_bytes=None)).best()
        refusal = too_large(card, machine, fitting.least(), _unasked(fitting), on_host)
        return replace(as_written, refusal=refusal)
    whole = whole_pixels(card, card.memory, fitted, machine.limit_bytes)
    return replace(
        as_written,
        parts=fitted.parts,
        vae_tiling=fitted.rung.tiled,
        whole_pixels=whole,
        rows=fitted.rows,
        lora_slots=fitted.lora_slots,
        planned=fitted.bytes,
        working_bytes=fitted.least.working,
        host_bytes=fitted.host_bytes,
        notes=notes_of(
            card,
            machine,
            as_written.dtype,
            fitted,
            beside,
            whole,
            channels_last=as_written.channels_last,
        ),
    )


def _with_files(plan: Plan, gguf: Mapping[str, GgufNeeds]) -> Plan:
    """The plan with the parts whose weights come from GGUF files."""
    parts = [part for part in plan.parts if part.name not in gguf]
    parts += [replace(plan.part(name), gguf=needs) for name, needs in gguf.items()]
    return replace(plan, parts=tuple(sorted(parts, key=lambda part: part.name)))


def _unasked(fitting: Fitting) -> Fitted | None:
    """What fits if the card leaves to the plan what it sets itself; None: nothing, or it sets nothing."""
    serving = fitting.card.serving
    free = serving.model_copy(update=LEFT_TO_THE_PLAN | {"compile": False})
    if serving == free:
        return None
    return replace(fitting, card=fitting.card.model_copy(update={"serving": free})).best()


def _as_written(card: ModelCard, machine: Machine) -> Plan:
    """What the card itself says, without any reckoning."""
    serving = card.serving
    dtype: Dtype = card.weights.dtype
    if dtype == "bfloat16" and not machine.computes_bfloat16:
        dtype = "float16"
    forms, places = _quantised(serving.quantisation), _places(serving.offload, machine)
    vae = {"vae"} if dtype == "float16" else set()
    return Plan(
        dtype,
        tuple(
            PartPlan(name, dtype_of_part(name, dtype), places.get(name, "device"), forms.get(name))
            for name in sorted(vae | forms.keys() | places.keys())
        ),
        attention=serving.attention,
        vae_tiling=serving.vae_tiling is True,
        vae_slicing=serving.vae_slicing is True,
        channels_last=_channels_last(serving, machine, dtype),
    )


def _channels_last(serving: Serving, machine: Machine, dtype: Dtype) -> bool:
    """GPUs have kernels for 16 bits that read convolutions' weights and inputs by pixel. On a CPU it was not
    measured, and stays off."""
    if serving.channels_last != "auto":
        return serving.channels_last
    return machine.is_gpu and dtype != "float32"


def _places(offload: str, machine: Machine) -> dict[str, Placement]:
    """The places that a card asks for, of parts that are not always on the device. A CPU has one memory."""
    if machine.kind == "cpu" or offload in ("auto", "none"):
        return {}
    denoiser: Placement = "streamed" if offload == "balanced" else "sequential"
    encoder = ENCODERS_ALONE.get(offload, "sequential" if offload == "sequential" else "on_demand")
    places = dict.fromkeys(TEXT_ENCODERS, encoder)
    if offload in ENCODERS_ALONE:
        return places
    vae: dict[str, Placement] = {"vae": "on_demand"} if offload == "sequential" else {}
    return places | vae | dict.fromkeys(DENOISERS, denoiser)


def _quantised(
    wanted: Literal["auto", "none"] | Quantisation | Mapping[str, Literal["none"] | Quantisation],
) -> dict[str, Quantisation | None]:
    """By part, the form that a card asks for: one that it names alone is the denoisers'."""
    if wanted == "auto" or wanted == "none":
        return {}
    if isinstance(wanted, str):
        return dict.fromkeys(DENOISERS, wanted)
    return {name: None if kind == "none" else kind for name, kind in wanted.items()}


def everything_on_device(dtype: Dtype) -> Plan:
    """The plan of a device that has the memory for all parts in this dtype."""
    return Plan(dtype)
