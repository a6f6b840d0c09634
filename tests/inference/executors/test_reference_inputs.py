"""Reference pictures from the request's files to the pipeline, and what the result's file says of them."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import pytest
from PIL import Image

from deployments.executors.inputs import decode_inputs
from deployments.executors.warm_up import warm_up
from deployments.media import still
from deployments.protocol.card import ModelCard, References
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import GenerationRequest, ResolvedRequest, Task
from tests.inference.validation.test_resolve_references import CARD


def png(size: tuple[int, int], colour: Any = (200, 30, 40), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def edit(*references: bytes) -> ResolvedRequest:
    return ResolvedRequest(
        model="tiny",
        prompt="make it blue",
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=0.0,
        seed=1,
        max_sequence_length=None,
        references=references,
    )


def test_pictures_keep_their_sizes_where_the_pipeline_scales_them() -> None:
    inputs = decode_inputs(edit(png((90, 60)), png((40, 80))), {}, None, References(max=2))

    assert [picture.size for picture in inputs.references] == [(90, 60), (40, 80)]
    assert [picture.mode for picture in inputs.references] == ["RGB", "RGB"]
    assert inputs.image is None


def test_pictures_are_scaled_to_the_area_that_the_card_says() -> None:
    inputs = decode_inputs(edit(png((300, 200)), png((16, 16))), {}, None, References(pixels=64 * 64))

    assert [picture.size for picture in inputs.references] == [(78, 52), (64, 64)]


def test_a_transparent_picture_is_reported_by_its_name() -> None:
    inputs = decode_inputs(
        edit(png((16, 16)), png((16, 16), (0, 0, 0, 0), "RGBA")), {}, None, References(max=2)
    )

    assert inputs.references[1].getpixel((0, 0)) == (255, 255, 255)
    assert [(code, field) for code, field, _ in inputs.warnings] == [
        ("transparency_removed", "reference_images.1")
    ]


def test_a_broken_picture_is_refused_by_its_name() -> None:
    with pytest.raises(BadRequest) as caught:
        decode_inputs(edit(png((16, 16)), b"no picture"), {}, None, References(max=2))

    assert caught.value.param == "reference_images.1"


def test_a_file_names_its_reference_pictures_by_digest() -> None:
    pictures = png((16, 16)), png((17, 17))
    digests = [hashlib.sha256(picture).hexdigest() for picture in pictures]

    facts = still.metadata(edit(*pictures), 1, "1.0", 0.5)
    text = still.a1111_parameters(edit(*pictures), 1, "1.0")

    assert facts["references"] == digests
    assert f"Reference 1: {digests[1][:12]}" in text
    assert "Denoising strength" not in text


async def test_a_model_that_only_edits_is_warmed_up_by_an_edit() -> None:
    seen: list[GenerationRequest] = []

    async def generate(request: GenerationRequest) -> Any:
        seen.append(request)
        return
        yield

    class Prover:
        async def prove_all(self, limit_s: float) -> None:
            """Nothing to prove."""

        def proofs(self) -> list[Any]:
            return []

    await warm_up(ModelCard.model_validate(CARD), generate, Prover())

    (request,) = seen
    assert request.task is Task.edit
    assert Image.open(io.BytesIO(request.references[0])).size == (CARD.sizes.width, CARD.sizes.height)
