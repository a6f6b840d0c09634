"""Noise schedulers by the names used in requests."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import torch

from deployments.pipelines.host_timesteps import look_up_on_host
from deployments.protocol.errors import BadRequest

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

# name -> (diffusers class, changes to the config of the model's own noise scheduler)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    # for models that predict noise (or velocity, or the picture)
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpmpp_sde": (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True},
    ),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    # for models that predict flow
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow_lcm": ("FlowMatchLCMScheduler", {}),
    "flow_unipc": ("UniPCMultistepScheduler", FLOW),
    "flow_dpmpp_2m": ("DPMSolverMultistepScheduler", FLOW | {"algorithm_type": "dpmsolver++"}),
}


def noise_scheduler(name: str, own: Any, device: torch.device | None = None) -> Any:
    """A new noise scheduler for one request; they have state, so requests never share one.

    own: the model's noise scheduler, copied for "auto", and the source of the config otherwise.
    device: of the model.
    Raises BadRequest for a name that is not in SCHEDULERS or does not match what the model predicts.
    """
    scheduler = _new(name, own)
    if device is not None and device.type == "cuda":
        look_up_on_host(scheduler)
    return scheduler


def _new(name: str, own: Any) -> Any:
    if name == "auto":
        return copy.deepcopy(own)
    if name not in SCHEDULERS:
        raise BadRequest(
            f"scheduler {name!r} is not known; use auto, {', '.join(SCHEDULERS)}", param="scheduler"
        )
    flow = predicts_flow(own)
    if name.startswith("flow_") is not flow:
        usable = (other for other in SCHEDULERS if other.startswith("flow_") is flow)
        raise BadRequest(
            f"scheduler {name!r} is for models that predict {'noise' if flow else 'flow'}, and this one "
            f"predicts {'flow' if flow else 'noise'}; use auto or one of {', '.join(usable)}",
            param="scheduler",
        )
    class_name, changes = SCHEDULERS[name]
    if "use_flow_sigmas" in changes:
        changes = changes | {"flow_shift": own.config.get("shift", 1.0)}  # the same number under another name
    kind: Any = getattr(diffusers, class_name)
    known = inspect.signature(kind.__init__).parameters
    config = {key: value for key, value in own.config.items() if key in known or key.startswith("_")}
    return kind.from_config(config, **changes)


def predicts_flow(scheduler: Any) -> bool:
    """Whether a model with this noise scheduler predicts the flow from noise to picture, not the noise."""
    config = scheduler.config
    return (
        type(scheduler).__name__.startswith("FlowMatch")
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas", False))
    )
