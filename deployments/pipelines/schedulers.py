"""Noise schedulers by the names that requests use."""

from __future__ import annotations

import copy
from typing import Any

import diffusers

from deployments.protocol.errors import BadRequest

# name -> (diffusers class, what it changes in the model's own scheduler config)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "ddim": ("DDIMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
}


def noise_scheduler(name: str, own: Any) -> Any:
    """A fresh noise scheduler for one request; they keep state, so none is ever shared.

    own: the model's scheduler, copied for "auto" and the source of the config otherwise.
    Raises BadRequest for a name that is not in SCHEDULERS.
    """
    if name == "auto":
        return copy.deepcopy(own)
    if name not in SCHEDULERS:
        raise BadRequest(
            f"scheduler {name!r} is not known; use auto, {', '.join(SCHEDULERS)}", param="scheduler"
        )
    class_name, changes = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(own.config, **changes)
