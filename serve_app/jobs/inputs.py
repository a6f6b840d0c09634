"""Given pictures beside the job's record: taken out before it is stored, put back before it runs (pure)."""

from __future__ import annotations

from collections.abc import Mapping

from deployments.protocol.request import ResolvedRequest


def detach(request: ResolvedRequest) -> tuple[ResolvedRequest, dict[str, bytes]]:
    """The request with empty picture bytes, and the pictures by field name.

    Empty, not absent: the task (i2i or inpaint) can still be read off the request.
    """
    images = {f"control_{index}": control.image for index, control in enumerate(request.controls)}
    if request.edit is not None:
        images["image"] = request.edit.image
        if request.edit.mask_image is not None:
            images["mask_image"] = request.edit.mask_image
    return _with_images(request, dict.fromkeys(images, b"")), images


def attach(request: ResolvedRequest, images: Mapping[str, bytes]) -> ResolvedRequest:
    """The request as it was before `detach`."""
    return _with_images(request, images)


def names(request: ResolvedRequest) -> tuple[str, ...]:
    """Field names of the pictures a detached request needs to run."""
    controls = tuple(f"control_{index}" for index in range(len(request.controls)))
    if request.edit is None:
        return controls
    return (*controls, "image") if request.edit.mask_image is None else (*controls, "image", "mask_image")


def _with_images(request: ResolvedRequest, images: Mapping[str, bytes]) -> ResolvedRequest:
    changes: dict[str, object] = {
        "controls": tuple(
            control.model_copy(update={"image": images[f"control_{index}"]})
            for index, control in enumerate(request.controls)
        )
    }
    if request.edit is not None:
        given = {name: images[name] for name in ("image", "mask_image") if name in images}
        changes["edit"] = request.edit.model_copy(update=given)
    return request.model_copy(update=changes)
