"""A plan as plain values, for other processes and for the API."""

from __future__ import annotations

from deployments.planning.plan import Plan
from deployments.planning.summary import summary


def report(plan: Plan) -> dict[str, object]:
    """What `GET /api/models` shows of it."""
    return {
        "summary": summary(plan),
        "dtype": plan.dtype,
        "quantised": {part.name: part.form for part in plan.parts if part.form is not None},
        "placed": {part.name: part.placement for part in plan.parts if part.placement != "device"},
        "vae_tiling": plan.vae_tiling,
        "rows": plan.rows,
        "lora_slots": plan.lora_slots,
        "peak_bytes": None if plan.planned is None else plan.planned.peak,
        "host_bytes": plan.host_bytes,
        "notes": list(plan.notes),
    }
