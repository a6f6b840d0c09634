"""The pictures of a request, decoded to what its pipeline takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from PIL.Image import Image

from deployments.media import decode
from deployments.media.control import Preprocessor, control_map
from deployments.pipelines.framewise import VideoFrame, camera_view
from deployments.protocol.request import ControlType, ResolvedRequest
from deployments.validation.inputs import control_field


@dataclass(frozen=True, slots=True)
class Inputs:
    """Pictures of the request's size."""

    image: Image | None  # RGB
    mask: Image | None  # L
    control_maps: list[Image]  # RGB, one per control picture


def decode_inputs(
    request: ResolvedRequest, preprocessors: Mapping[ControlType, Preprocessor], frame: VideoFrame | None
) -> Inputs:
    """Decode the request's pictures and make its control maps. Blocks; call it in a thread.

    preprocessors: make depth and pose maps of plain pictures.
    frame: of a frame-wise video; where its camera moves, the image is what the camera sees in this frame.
    Raises BadRequest or TooLarge naming the field of a picture that cannot be used.
    """
    width, height = request.width, request.height
    control_maps = [
        control_map(control, width, height, control_field(request, index), preprocessors)
        for index, control in enumerate(request.controls)
    ]
    edit = request.edit
    if edit is None:
        return Inputs(None, None, control_maps)
    if frame is not None and frame.video.moves:
        whole = decode.own_size(edit.image, "image")
        return Inputs(camera_view(whole, frame, width, height), None, control_maps)
    image = decode.picture(edit.image, width, height, "image")
    mask = None
    if edit.mask_image is not None:
        mask = decode.mask(edit.mask_image, width, height, "mask_image")
    return Inputs(image, mask, control_maps)
