"""The plan of a model on a device: which dtype, form and place each of its parts has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from deployments.planning.machine import Machine
from deployments.protocol.card import Dtype, ModelCard, Quantisation

# device: always on it. on_demand: in memory of the host, copied to the device for each use and dropped there
# after it. cpu: computes on the CPU. streamed: blocks beyond `resident_blocks` are copied to the device while
# others compute. sequential: each layer is copied when it computes
Placement = Literal["device", "on_demand", "cpu", "streamed", "sequential"]

DENOISERS = ("transformer", "transformer_2", "unet")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One component of a pipeline."""

    name: str  # as in the pipeline, such as "text_encoder_2"
    dtype: Dtype  # it computes in
    placement: Placement = "device"
    quantisation: Quantisation | None = None
    resident_blocks: int = 0  # of a streamed part: how many of its blocks stay on the device
    weight_bytes: int = 0  # all of it, in its final form; 0: not known
    device_bytes: int = 0  # the most of it that is on the device at a time


@dataclass(frozen=True, slots=True)
class Plan:
    """How one model runs on one device."""

    dtype: Dtype  # of parts that `parts` does not name
    parts: tuple[PartPlan, ...] = ()
    attention: str | None = None  # backend of diffusers' set_attention_backend; None: torch's own choice
    vae_tiling: bool = False
    vae_slicing: bool = False
    channels_last: bool = False  # memory format of UNets and VAEs

    def part(self, name: str) -> PartPlan:
        """The plan of this component; one that is not named is on the device in the model's dtype."""
        return next((part for part in self.parts if part.name == name), PartPlan(name, self.dtype))


def plan_of(card: ModelCard, machine: Machine) -> Plan:
    """The plan of the card's model on this machine."""
    serving = card.serving
    dtype = _dtype(card.weights.dtype, machine)
    forms, places = _quantised(serving.quantisation), _places(serving.offload, machine)
    vae = {"vae"} if dtype == "float16" else set()  # most VAEs overflow in it
    return Plan(
        dtype,
        tuple(
            PartPlan(name, "float32" if name in vae else dtype, places.get(name, "device"), forms.get(name))
            for name in sorted(vae | forms.keys() | places.keys())
        ),
        attention=serving.attention,
        vae_tiling=serving.vae_tiling is True,
        vae_slicing=serving.vae_slicing is True,
        channels_last=serving.channels_last is True,
    )


def _places(offload: str, machine: Machine) -> dict[str, Placement]:
    """The places that a card asks for, of parts that are not always on the device. A CPU has one memory."""
    if machine.kind == "cpu" or offload in ("auto", "none"):
        return {}
    denoiser: Placement = "streamed" if offload == "balanced" else "sequential"
    encoder: Placement = "sequential" if offload == "sequential" else "on_demand"
    places = dict.fromkeys(TEXT_ENCODERS, encoder)
    return places if offload == "text_encoders" else places | dict.fromkeys(DENOISERS, denoiser)


def _quantised(
    wanted: Literal["auto", "none"] | Quantisation | Mapping[str, Literal["none"] | Quantisation],
) -> dict[str, Quantisation | None]:
    """By part, the form that a card asks for: one that it names alone is the denoisers'."""
    if wanted == "auto" or wanted == "none":
        return {}
    if isinstance(wanted, str):
        return dict.fromkeys(DENOISERS, wanted)
    return {name: None if kind == "none" else kind for name, kind in wanted.items()}


def _dtype(wanted: Dtype, machine: Machine) -> Dtype:
    """GPUs before NVIDIA's Ampere compute in float16, not in bfloat16."""
    old = machine.capability is not None and machine.capability < (8, 0)
    return "float16" if old and wanted == "bfloat16" else wanted


def everything_on_device(dtype: Dtype) -> Plan:
    """The plan of a device that has the memory for all parts in this dtype."""
    return Plan(dtype)
