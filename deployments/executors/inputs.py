"""The pictures of a request, decoded to what its pipeline takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from PIL.Image import Image

from deployments.media import decode
from deployments.media.control import Preprocessor, control_map
from deployments.media.fitting import fitted, with_aspect
from deployments.media.inpainting import Inpainting, PasteBack, prepare
from deployments.pipelines.framewise import VideoFrame, camera_view
from deployments.protocol.request import ControlType, ResolvedEdit, ResolvedRequest
from deployments.validation.inputs import control_field

Notice = tuple[str, str, str]  # code, field and message of a warning


@dataclass(frozen=True, slots=True)
class Inputs:
    """Pictures of the request's size."""

    image: Image | None  # RGB
    mask: Image | None  # L
    control_maps: list[Image]  # RGB, one per control picture
    paste_back: PasteBack | None = None  # for finished pictures; None: they stay as they are
    warnings: tuple[Notice, ...] = ()


def decode_inputs(
    request: ResolvedRequest, preprocessors: Mapping[ControlType, Preprocessor], frame: VideoFrame | None
) -> Inputs:
    """Decode the request's pictures and make its control maps. Blocks; call it in a thread.

    preprocessors: make depth and pose maps of plain pictures.
    frame: of a frame-wise video; where its camera moves, the image is what the camera sees in this frame.
    Raises BadRequest or TooLarge naming the field of a picture that cannot be used.
    """
    size, edit = (request.width, request.height), request.edit
    if edit is None:
        return Inputs(None, None, _control_maps(request, preprocessors, None))
    if edit.is_masked:
        inpainting = prepare(edit, size, request.fit)
        return Inputs(
            inpainting.image,
            inpainting.mask,
            _control_maps(request, preprocessors, inpainting),
            inpainting.paste_back,
            _mask_warnings(edit, inpainting.marked),
        )
    if frame is not None and frame.video.moves:
        whole = with_aspect(decode.own_size(edit.image, "image"), size, request.fit)
        image = camera_view(whole, frame, *size)
    else:
        image = decode.picture(edit.image, *size, "image", request.fit)
    return Inputs(image, None, _control_maps(request, preprocessors, None))


def _control_maps(
    request: ResolvedRequest,
    preprocessors: Mapping[ControlType, Preprocessor],
    inpainting: Inpainting | None,
) -> list[Image]:
    """One map per control picture. Of a canvas that is inpainted, each shows the area that is generated."""

    def fit(picture: Image, is_map: bool) -> Image:
        if inpainting is None:
            return fitted(picture, (request.width, request.height), request.fit, black_border=is_map)
        canvas = fitted(picture, inpainting.canvas_size, request.fit, black_border=is_map)
        return inpainting.area.picture(canvas, black_border=is_map)

    return [
        control_map(control, fit, control_field(request, index), preprocessors)
        for index, control in enumerate(request.controls)
    ]


def _mask_warnings(edit: ResolvedEdit, marked: float) -> tuple[Notice, ...]:
    """marked: part of the picture that the mask marks, 0..1."""
    field = "image" if edit.mask_image is None else "mask_image"
    if marked == 0:
        how = "transparent" if edit.mask_channel == "alpha" else "white and opaque"
        message = f"{field} edits nothing: none of its pixels is {how}, so the picture stays as it is"
        return (("mask_empty", field, message),)
    if marked == 1:
        what = "transparent" if edit.mask_channel == "alpha" else "white"
        message = f"{field} edits everything: all of it is {what}, so nothing of the picture is kept"
        return (("mask_full", field, message),)
    return ()
