"""The events of a request with their files signed, and with a warning where files are not."""

from __future__ import annotations

from dataclasses import replace

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.events import Artifact, Done, Event
from deployments.protocol.request import ResolvedRequest
from deployments.provenance.signing import ManifestSigner

SWITCHED_OFF = Adjustment(
    "not_signed",
    "",
    "the files carry no content credentials: the operator has switched them off for this user",
    of_result=True,
)
NO_WEBM = Adjustment(
    "not_signed",
    "format",
    "the video carries no content credentials, because WebM files cannot; choose mp4 for a signed video",
    of_result=True,
)


async def sign_event(signer: ManifestSigner, event: Event, request: ResolvedRequest, user: str) -> Event:
    """The event, a file of it signed unless that is switched off for this user. Raises Internal."""
    if isinstance(event, Artifact) and not signer.skips(user):
        return await signer.sign(event, request)
    if isinstance(event, Done):
        if signer.skips(user):
            return replace(event, warnings=(*event.warnings, SWITCHED_OFF))
        if request.video is not None and request.video.format == "webm":
            return replace(event, warnings=(*event.warnings, NO_WEBM))
    return event
