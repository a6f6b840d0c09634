"""The units of A1111's ControlNet extension as control images."""

from __future__ import annotations

from typing import Any, cast

from pydantic import ValidationError

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import Control, ControlType
from serve_app.api.a1111.schemas import ControlUnit
from serve_app.api.validation_messages import bad_request

FIELD = "alwayson_scripts.controlnet"
KINDS = {"canny": "canny", "depth": "depth", "pose": "pose"}  # a part of the names of modules and models
BALANCED = ("Balanced", 0)


def read_units(scripts: dict[str, Any]) -> tuple[tuple[Control, ...], tuple[Adjustment, ...]]:
    """The control images, and warnings of scripts that are not run. Raises BadRequest."""
    controls: list[Control] = []
    notices: list[Adjustment] = []
    for name, script in scripts.items():
        units = script.get("args", []) if isinstance(script, dict) else script
        if name.lower() != "controlnet":
            if units:
                message = f"the script {name[:100]!r} is not run here; leave it out"
                notices.append(Adjustment("script_ignored", "alwayson_scripts", message))
            continue
        for unit in units if isinstance(units, list) else []:
            control, ignored = _control(unit)
            controls += [] if control is None else [control]
            notices += ignored
    return tuple(controls), tuple(notices)


def _control(unit: Any) -> tuple[Control | None, tuple[Adjustment, ...]]:
    try:
        read = ControlUnit.model_validate(unit)
    except ValidationError as error:
        fault = bad_request(error, ControlUnit)
        raise BadRequest(f"{FIELD}: {fault.message}", param=FIELD) from None
    if not read.enabled:
        return None, ()
    image = read.image if isinstance(read.image, bytes) else read.input_image
    if isinstance(read.image, dict):
        raise BadRequest(f"{FIELD}: send image as base64 text, not as an object", param=FIELD)
    if image is None:
        raise BadRequest(f"{FIELD}: a unit needs its image; or send enabled: false", param=FIELD)
    if read.guidance_start >= read.guidance_end:
        raise BadRequest(f"{FIELD}: guidance_start must be below guidance_end", param=FIELD)
    is_map = read.module.lower() in ("", "none")
    notices: tuple[Adjustment, ...] = ()
    if read.control_mode not in BALANCED:
        message = f"control_mode {read.control_mode!r} has no effect here; it is Balanced"
        notices = (Adjustment("control_mode_ignored", FIELD, message),)
    control = Control(
        image=image,
        type=_kind(read),
        weight=read.weight,
        start=read.guidance_start,
        end=read.guidance_end,
        is_map=is_map,
    )
    return control, notices


def _kind(unit: ControlUnit) -> ControlType:
    for name in (unit.model.lower(), unit.module.lower()):
        for part, kind in KINDS.items():
            if part in name:
                return cast(ControlType, kind)
    raise BadRequest(
        f"{FIELD}: model {unit.model!r} with module {unit.module!r} is neither canny, depth nor pose; "
        "see GET /controlnet/model_list",
        param=FIELD,
    )
