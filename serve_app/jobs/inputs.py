"""Input images of a request: detached before its record is stored, attached before it runs (pure)."""

from __future__ import annotations

from collections.abc import Mapping

from deployments.protocol.request import ResolvedRequest


def detach(request: ResolvedRequest) -> tuple[ResolvedRequest, dict[str, bytes]]:
    """The request with empty image bytes, and the images by field name.

    Empty, not absent: the task (i2i or inpaint) can still be read off the request.
    """
    images = {f"control_{index}": control.image for index, control in enumerate(request.controls)}
    images |= dict(zip(_reference_names(request), request.references, strict=True))
    if request.edit is not None:
        images["image"] = request.edit.image
        if request.edit.mask_image is not None:
            images["mask_image"] = request.edit.mask_image
    if request.video is not None and request.video.last_image is not None:
        images["last_image"] = request.video.last_image
    return attach(request, dict.fromkeys(images, b"")), images


def attach(request: ResolvedRequest, images: Mapping[str, bytes]) -> ResolvedRequest:
    """The request with these image bytes, given by field name as `detach` returns them."""
    changes: dict[str, object] = {
        "controls": tuple(
            control.model_copy(update={"image": images[f"control_{index}"]})
            for index, control in enumerate(request.controls)
        ),
        "references": tuple(images[name] for name in _reference_names(request)),
    }
    if request.edit is not None:
        edited = {name: images[name] for name in ("image", "mask_image") if name in images}
        changes["edit"] = request.edit.model_copy(update=edited)
    if request.video is not None and "last_image" in images:
        changes["video"] = request.video.model_copy(update={"last_image": images["last_image"]})
    return request.model_copy(update=changes)


def names(request: ResolvedRequest) -> tuple[str, ...]:
    """Field names of the images that a detached request needs to run."""
    given = (*(f"control_{index}" for index in range(len(request.controls))), *_reference_names(request))
    if request.video is not None and request.video.last_image is not None:
        given = (*given, "last_image")
    if request.edit is None:
        return given
    return (*given, "image") if request.edit.mask_image is None else (*given, "image", "mask_image")


def _reference_names(request: ResolvedRequest) -> tuple[str, ...]:
    return tuple(f"reference_{index}" for index in range(len(request.references)))
