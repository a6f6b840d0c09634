"""A plan in one line."""

from __future__ import annotations

from deployments.planning.device_limit import GIB
from deployments.planning.part_plan import PartPlan
from deployments.planning.plan import Plan

PLACES = {
    "on_demand": "on demand",
    "streamed": "streamed",
    "sequential": "layer by layer",
    "cpu": "on the CPU",
}


def summary(plan: Plan) -> str:
    """What differs from everything on the device in 16 bits, with the peak: "fp8 transformer: 21.8 GiB"."""
    if plan.refusal is not None:
        return "refused"
    parts = [words for part in plan.parts if (words := _part(part))]
    if plan.vae_tiling:
        parts.append("tiled VAE")
    text = ", ".join(parts) or "all on the device"
    if plan.dtype == "float16":
        text += ", float16"
    if plan.planned is None:
        return text
    return f"{text}: {plan.planned.peak / GIB:.1f} GiB, {plan.rows} rows, {plan.lora_slots} LoRAs"


def _part(part: PartPlan) -> str:
    """ "int8 transformer streamed (17 blocks stay)"; empty for one that is as it is, on the device."""
    if part.form is None and part.placement == "device":
        return ""
    words = [part.form or "", part.name, PLACES.get(part.placement, "")]
    if part.resident_blocks:
        words.append(f"({part.resident_blocks} blocks stay)")
    return " ".join(word for word in words if word)
