"""A plan as plain values, for other processes and for the API."""

from __future__ import annotations

from deployments.planning.plan import Plan
from deployments.planning.summary import summary


def report(plan: Plan, device: str, *, loaded: bool) -> dict[str, object]:
    """What `GET /api/models` shows of it. device: its name. loaded: whether the model runs so already."""
    return {
        "summary": summary(plan),
        "device": device,
        "loaded": loaded,
        "refusal": None if plan.refusal is None else plan.refusal.message,
        "dtype": plan.dtype,
        "quantised": {part.name: part.form for part in plan.parts if part.form is not None},
        "placed": {part.name: part.placement for part in plan.parts if part.placement != "device"},
        "vae_tiling": plan.vae_tiling,
        "whole_pixels": plan.whole_pixels,
        "rows": plan.rows,
        "lora_slots": plan.lora_slots,
        "peak_bytes": None if plan.planned is None else plan.planned.peak,
        "host_bytes": plan.host_bytes,
        "notes": list(plan.notes),
    }
