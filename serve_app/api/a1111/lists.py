"""What A1111's clients list before they draw: models, samplers, LoRAs, upscalers, ControlNets."""

from __future__ import annotations

from typing import Any

import psutil
from fastapi import APIRouter

from deployments.protocol.request import Task
from serve_app.api.a1111.memory import options
from serve_app.api.a1111.pictures import UPSCALERS
from serve_app.api.a1111.requests import CHECKPOINT
from serve_app.api.a1111.samplers import LABELS, SCHEDULES, label
from serve_app.api.auth import CurrentCaller
from serve_app.api.caller import CallerContext

router = APIRouter(tags=["a1111"])
Entries = list[dict[str, Any]]
CONTROLNET_VERSION = 2  # of the extension's API
SCRIPTS = ["controlnet"]


@router.get("/sdapi/v1/sd-models")
async def list_checkpoints(caller: CurrentCaller) -> Entries:
    """The models that make images."""
    return [
        {
            "title": card.id,
            "model_name": card.id,
            "hash": None,
            "sha256": None,
            "filename": card.id,
            "config": None,
        }
        for card in caller.state.cards.values()
        if {Task.t2i, Task.i2i, Task.inpaint} & set(card.tasks)
    ]


@router.get("/sdapi/v1/samplers")
async def list_samplers(caller: CurrentCaller) -> Entries:
    """Those of the caller's model, or of every model until it chooses one."""
    chosen = (await options(caller))[CHECKPOINT]
    cards = [card for card in caller.state.cards.values() if chosen in ("", card.id)]
    names = dict.fromkeys(["auto", *(name for card in cards for name in card.schedulers)])
    labels = dict.fromkeys(label(name) for name in names)
    return [
        {"name": text, "aliases": [name for name in names if label(name) == text], "options": {}}
        for text in labels
    ]


@router.get("/sdapi/v1/schedulers")
async def list_schedules(caller: CurrentCaller) -> Entries:
    """Noise schedules that some sampler of a model here has."""
    known = {name for card in caller.state.cards.values() for name in card.schedulers}
    with_karras = any(LABELS.get(name, "").endswith(" Karras") for name in known)
    return [
        {"name": name, "label": text, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name, text in SCHEDULES.items()
        if name != "karras" or with_karras
    ]


@router.get("/sdapi/v1/loras")
async def list_loras(caller: CurrentCaller) -> Entries:
    """The LoRAs that prompts of the caller may name."""
    records = [] if caller.state.lora_service is None else await caller.lora_service.list(caller.owner)
    return [
        {
            "name": record.name,
            "alias": record.name,
            "path": record.name,
            "metadata": {"ss_base_model_version": record.family, "trigger_words": record.trigger_words},
        }
        for record in records
    ]


@router.get("/sdapi/v1/upscalers")
async def list_upscalers(caller: CurrentCaller) -> Entries:  # noqa: ARG001
    """What /sdapi/v1/extra-single-image enlarges images with."""
    return [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4}
        for name in UPSCALERS
    ]


@router.get("/sdapi/v1/embeddings")
async def list_embeddings(caller: CurrentCaller) -> dict[str, Any]:  # noqa: ARG001
    """None: prompts name LoRAs instead."""
    return {"loaded": {}, "skipped": {}}


@router.get("/sdapi/v1/prompt-styles")
@router.get("/sdapi/v1/sd-vae", operation_id="list_vaes")
@router.get("/sdapi/v1/sd-modules", operation_id="list_modules")
@router.get("/sdapi/v1/hypernetworks", operation_id="list_hypernetworks")
@router.get("/sdapi/v1/face-restorers", operation_id="list_face_restorers")
@router.get("/sdapi/v1/latent-upscale-modes", operation_id="list_latent_upscalers")
async def list_nothing(caller: CurrentCaller) -> Entries:  # noqa: ARG001
    """Empty: there are none here."""
    return []


@router.post("/sdapi/v1/refresh-checkpoints")
@router.post("/sdapi/v1/refresh-loras", operation_id="refresh_loras")
@router.post("/sdapi/v1/refresh-vae", operation_id="refresh_vaes")
async def refresh(caller: CurrentCaller) -> dict[str, Any]:  # noqa: ARG001
    """Nothing to do: lists are always current."""
    return {}


@router.get("/sdapi/v1/scripts")
async def list_scripts(caller: CurrentCaller) -> dict[str, list[str]]:  # noqa: ARG001
    """ControlNet alone."""
    return {"txt2img": SCRIPTS, "img2img": SCRIPTS}


@router.get("/sdapi/v1/script-info")
async def describe_scripts(caller: CurrentCaller) -> Entries:  # noqa: ARG001
    """The same, each with its kind."""
    return [
        {"name": name, "is_alwayson": True, "is_img2img": is_img2img, "args": []}
        for name in SCRIPTS
        for is_img2img in (False, True)
    ]


@router.get("/sdapi/v1/cmd-flags")
async def read_flags(caller: CurrentCaller) -> dict[str, Any]:
    """What of A1111's command line has a meaning here."""
    return {"api": True, "api_auth": None, "listen": True, "nowebui": not caller.state.settings.ui}


@router.get("/sdapi/v1/memory")
async def read_memory(caller: CurrentCaller) -> dict[str, Any]:  # noqa: ARG001
    """Of the machine that answers, in bytes; GPUs are those of replicas, elsewhere."""
    memory = psutil.virtual_memory()
    ram = {"free": memory.available, "used": memory.used, "total": memory.total}
    return {"ram": ram, "cuda": {"error": "unavailable"}}


@router.get("/controlnet/version")
async def read_controlnet_version(caller: CurrentCaller) -> dict[str, int]:  # noqa: ARG001
    return {"version": CONTROLNET_VERSION}


@router.get("/controlnet/model_list")
async def list_controlnets(caller: CurrentCaller) -> dict[str, list[str]]:
    """The kinds of control image that some model here takes."""
    return {"model_list": _kinds(caller)}


@router.get("/controlnet/module_list")
async def list_preprocessors(caller: CurrentCaller) -> dict[str, Any]:
    """What makes a control image of a plain one; none: it is one."""
    cards = caller.state.cards.values()
    able = [
        kind
        for kind in _kinds(caller)
        if kind == "canny" or any(kind in c.controls and c.controls[kind].preprocessor for c in cards)
    ]
    return {"module_list": ["none", *able], "module_detail": {}}


@router.get("/controlnet/control_types")
async def list_control_types(caller: CurrentCaller) -> dict[str, Any]:
    """The same kinds, each with its modules and models."""
    return {
        "control_types": {
            kind.title(): {
                "module_list": ["none", kind],
                "model_list": [kind],
                "default_option": kind,
                "default_model": kind,
            }
            for kind in _kinds(caller)
        }
    }


def _kinds(caller: CallerContext) -> list[str]:
    return list(dict.fromkeys(kind for card in caller.state.cards.values() for kind in card.controls))
