"""The pictures of a request, decoded to what its pipeline takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from PIL.Image import Image

from deployments.media import decode
from deployments.media.control import Preprocessor, control_map
from deployments.media.fitting import fitted, with_area, with_aspect
from deployments.media.inpainting import Inpainting, PasteBack, prepare
from deployments.pipelines.framewise import VideoFrame, camera_view
from deployments.protocol.card import References
from deployments.protocol.request import ControlType, ResolvedEdit, ResolvedRequest
from deployments.validation.inputs import control_field, reference_field

Notice = tuple[str, str, str]  # code, field and message of a warning


@dataclass(frozen=True, slots=True)
class Inputs:
    """Pictures of the request's size."""

    image: Image | None  # RGB
    mask: Image | None  # L
    control_maps: list[Image]  # RGB, one per control picture
    paste_back: PasteBack | None = None  # for finished pictures; None: they stay as they are
    warnings: tuple[Notice, ...] = ()
    references: tuple[Image, ...] = ()  # RGB, of any size
    last_image: Image | None = None  # RGB, of a video


def decode_inputs(
    request: ResolvedRequest,
    preprocessors: Mapping[ControlType, Preprocessor],
    frame: VideoFrame | None,
    limits: References | None = None,
) -> Inputs:
    """Decode the request's pictures and make its control maps. Blocks; call it in a thread.

    preprocessors: make depth and pose maps of plain pictures.
    limits: of the card for reference pictures.
    frame: of a frame-wise video; where its camera moves, the image is what the camera sees in this frame.
    Raises BadRequest or TooLarge naming the field of a picture that cannot be used.
    """
    size, edit = (request.width, request.height), request.edit
    notices: list[Notice] = []
    last_image = _last_image(request, notices)
    if edit is None:
        maps = _control_maps(request, preprocessors, None, notices)
        references = _references(request, None if limits is None else limits.pixels, notices)
        return Inputs(None, None, maps, warnings=tuple(notices), references=references, last_image=last_image)
    if edit.is_masked:
        inpainting = prepare(edit, size, request.fit)
        notices += _mask_notices(edit, inpainting)
        maps = _control_maps(request, preprocessors, inpainting, notices)
        return Inputs(inpainting.image, inpainting.mask, maps, inpainting.paste_back, tuple(notices))
    given = decode.own_size(edit.image, "image")
    if decode.is_on_white(given):
        notices.append(_on_white("image"))
    if frame is not None and frame.video.moves:
        image = camera_view(with_aspect(given, size, request.fit), frame, *size)
    else:
        image = fitted(given, size, request.fit)
    maps = _control_maps(request, preprocessors, None, notices)
    return Inputs(image, None, maps, warnings=tuple(notices), last_image=last_image)


def _last_image(request: ResolvedRequest, notices: list[Notice]) -> Image | None:
    """The given last frame of a video, in its size."""
    if request.video is None or request.video.last_image is None:
        return None
    given = decode.own_size(request.video.last_image, "last_image")
    if decode.is_on_white(given):
        notices.append(_on_white("last_image"))
    return fitted(given, (request.width, request.height), request.fit)


def _references(request: ResolvedRequest, pixels: int | None, notices: list[Notice]) -> tuple[Image, ...]:
    """The reference pictures, upright and opaque. pixels: of each about so many; None: as they are."""
    pictures = []
    for index, data in enumerate(request.references):
        field = reference_field(request, index)
        given = decode.own_size(data, field)
        if decode.is_on_white(given):
            notices.append(_on_white(field))
        pictures.append(given if pixels is None else with_area(given, pixels))
    return tuple(pictures)


def _control_maps(
    request: ResolvedRequest,
    preprocessors: Mapping[ControlType, Preprocessor],
    inpainting: Inpainting | None,
    notices: list[Notice],
) -> list[Image]:
    """One map per control picture. Of a canvas that is inpainted, each shows the area that is generated."""

    def fit(picture: Image, is_map: bool) -> Image:
        if inpainting is None:
            return fitted(picture, (request.width, request.height), request.fit, black_border=is_map)
        canvas = fitted(picture, inpainting.canvas_size, request.fit, black_border=is_map)
        return inpainting.area.picture(canvas, black_border=is_map)

    maps = []
    for index, control in enumerate(request.controls):
        field = control_field(request, index)
        given = decode.own_size(control.image, field)
        if decode.is_on_white(given):
            notices.append(_on_white(field))
        maps.append(control_map(control, given, fit, field, preprocessors))
    return maps


def _on_white(field: str) -> Notice:
    message = f"{field} is transparent in parts; they became white, because models take opaque pictures"
    return "transparency_removed", field, message


def _mask_notices(edit: ResolvedEdit, inpainting: Inpainting) -> list[Notice]:
    """What is remarkable about an inpainting's picture and mask."""
    field = "image" if edit.mask_image is None else "mask_image"
    own_holes = edit.mask_image is None and edit.mask_channel == "alpha"
    notices = [_on_white("image")] if inpainting.on_white and not own_holes else []
    if inpainting.marked == 0:
        how = "transparent" if edit.mask_channel == "alpha" else "white and opaque"
        message = f"{field} edits nothing: none of its pixels is {how}, so the picture stays as it is"
        notices.append(("mask_empty", field, message))
    if inpainting.marked == 1:
        what = "transparent" if edit.mask_channel == "alpha" else "white"
        message = f"{field} edits everything: all of it is {what}, so nothing of the picture is kept"
        notices.append(("mask_full", field, message))
    return notices
