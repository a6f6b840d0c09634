"""Samplers by A1111's names (pure)."""

from __future__ import annotations

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard
from serve_app.api.schemas.sampler_names import OTHER_NAMES

LABELS = {  # by the name of a noise scheduler here
    "auto": "Automatic",
    "euler": "Euler",
    "euler_karras": "Euler Karras",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2m_sde_karras": "DPM++ 2M SDE Karras",
    "dpmpp_sde": "DPM++ SDE",
    "ddim": "DDIM",
    "pndm": "PLMS",
    "unipc": "UniPC",
    "heun": "Heun",
    "lcm": "LCM",
    "flow_euler": "Euler",
    "flow_heun": "Heun",
    "flow_lcm": "LCM",
    "flow_unipc": "UniPC",
    "flow_dpmpp_2m": "DPM++ 2M",
}
SCHEDULES = {"automatic": "Automatic", "karras": "Karras"}  # noise schedules, by name


def label(scheduler: str) -> str:
    """What A1111 calls this noise scheduler."""
    return LABELS.get(scheduler, scheduler)


def choose(sampler: str | None, schedule: str | None, card: ModelCard) -> tuple[str, tuple[Adjustment, ...]]:
    """The card's noise scheduler of this name, `auto` where it has none, and a warning if that is another
    than was asked for.

    sampler: such as "DPM++ 2M" or "DPM++ 2M Karras". schedule: such as "Karras".
    """
    asked = " ".join((sampler or "").lower().split())
    noise = " ".join((schedule or "").lower().split())
    noise = "" if noise == "automatic" or asked.endswith(noise) else noise
    if noise and (found := _find(f"{asked} {noise}".strip(), card)) is not None:
        return found, ()
    found = _find(asked, card)
    if found is None:
        used = "auto"
        fault = f"{card.id} has no sampler {sampler!r}; its own was used"
        return used, (Adjustment("sampler_replaced", "sampler_name", fault),)
    if not noise:
        return found, ()
    fault = f"{card.id} has no noise schedule {schedule!r} for {label(found)}; its own was used"
    return found, (Adjustment("schedule_replaced", "scheduler", fault),)


def _find(name: str, card: ModelCard) -> str | None:
    """The card's noise scheduler with this name of either kind; None: it has none."""
    known = OTHER_NAMES.get(name, name)
    if known == "auto" or known in card.schedulers:
        return known
    return next((own for own in card.schedulers if label(own).lower() == name), None)
