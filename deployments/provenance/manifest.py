"""What a manifest states of a finished file: how it was made, by which model, from which inputs. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from deployments import __version__
from deployments.protocol.events import Artifact
from deployments.protocol.request import ResolvedRequest

SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATED = SOURCE_TYPES + "trainedAlgorithmicMedia"
EDITED = SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"
GENERATION = "org.weft.generation"  # label of the assertion with model, and seed and prompt where allowed
_MAGIC = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))


def definition(artifact: Artifact, request: ResolvedRequest, *, with_prompt: bool) -> dict[str, object]:
    """The manifest's definition for the library, without ingredients."""
    facts: dict[str, object] = {"model": request.model, "kind": artifact.kind}
    if with_prompt:
        facts |= {"seed": artifact.seed, "prompt": request.prompt}
        if request.negative_prompt:
            facts["negative_prompt"] = request.negative_prompt
    generator = {"name": "Weft", "version": __version__}
    created = {
        "action": "c2pa.created",
        "digitalSourceType": digital_source_type(request),
        "softwareAgent": generator,
        "description": f"made by the model {request.model}",
    }
    return {
        "claim_generator_info": [generator],
        "title": f"{artifact.kind} {artifact.index}",
        "format": artifact.media_type,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
            {"label": GENERATION, "data": facts},
        ],
    }


def digital_source_type(request: ResolvedRequest) -> str:
    """IPTC's term: a composite where a given picture is part of the result, as in edits. A control map only
    guides what is generated."""
    ends_with = request.video is not None and request.video.last_image is not None
    return EDITED if request.edit is not None or request.references or ends_with else GENERATED


def given_pictures(request: ResolvedRequest) -> Iterator[tuple[str, bytes]]:
    """Title and file of each picture that the request brought."""
    if request.edit is not None:
        yield "given image", request.edit.image
        if request.edit.mask_image is not None:
            yield "mask", request.edit.mask_image
    if request.video is not None and request.video.last_image is not None:
        yield "last frame", request.video.last_image
    for index, picture in enumerate(request.references):
        yield f"reference image {index}", picture
    for index, control in enumerate(request.controls):
        yield f"control image {index}", control.image


def picture_type(data: bytes) -> str | None:
    """The media type of a PNG, JPEG or WebP file, by its first bytes; None for others."""
    return next((media_type for magic, media_type in _MAGIC if data.startswith(magic)), None)
