"""Given pictures beside the job's record: taken out before it is stored, put back before it runs (pure)."""

from __future__ import annotations

from collections.abc import Mapping

from deployments.protocol.request import FittedRequest


def detach(request: FittedRequest) -> tuple[FittedRequest, dict[str, bytes]]:
    """The request with empty picture bytes, and the pictures by field name.

    Empty, not absent: the task (i2i or inpaint) can still be read off the request.
    """
    if request.edit is None:
        return request, {}
    taken = {"image": request.edit.image}
    if request.edit.mask_image is not None:
        taken["mask_image"] = request.edit.mask_image
    return _with_pictures(request, dict.fromkeys(taken, b"")), taken


def attach(request: FittedRequest, taken: Mapping[str, bytes]) -> FittedRequest:
    """The request as it was before `detach`."""
    return _with_pictures(request, taken) if taken else request


def names(request: FittedRequest) -> tuple[str, ...]:
    """Field names of the pictures a detached request needs to run."""
    if request.edit is None:
        return ()
    return ("image",) if request.edit.mask_image is None else ("image", "mask_image")


def _with_pictures(request: FittedRequest, pictures: Mapping[str, bytes]) -> FittedRequest:
    assert request.edit is not None, "only an edit has pictures"
    return request.model_copy(update={"edit": request.edit.model_copy(update=dict(pictures))})
