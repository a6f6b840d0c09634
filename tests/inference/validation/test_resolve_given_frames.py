"""The first and the last frame of a video against a card: what is taken, fitted and refused."""

from __future__ import annotations

import hashlib

import pytest

from deployments.executors.inputs import decode_inputs
from deployments.media import still
from deployments.protocol.card import LastImage, ModelCard, Sizes, Videos, load_card
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import Edit, GenerationRequest, ResolvedRequest, Task, Video
from deployments.provenance.manifest import digital_source_type, given_pictures
from deployments.validation.resolve import Resolved, denoising_steps, resolve
from tests.inference.video_files import ROOT, png

WAN = load_card(ROOT / "configs/models/tiny-wan.yaml")


def card(last_image: LastImage | None) -> ModelCard:
    assert WAN.videos is not None
    videos = WAN.videos.model_copy(update={"last_image": last_image})
    sizes = Sizes(width=64, height=64, min=32, max=128)
    return WAN.model_copy(update={"tasks": ["t2v", "i2v"], "videos": videos, "sizes": sizes})


def resolved(
    last_image: LastImage | None, first: bytes | None, last: bytes | None, width: int | None = None
) -> Resolved:
    request = GenerationRequest(
        model=WAN.id,
        prompt="a red circle",
        width=width,
        height=width,
        edit=None if first is None else Edit(image=first),
        video=Video(last_image=last),
    )
    return resolve(request, card(last_image), fresh_seed=1)


@pytest.mark.parametrize(
    ("last_image", "first", "last", "param", "says"),
    [
        (None, True, True, "last_image", "cannot end with a given frame; leave last_image out"),
        (None, False, True, "last_image", "use a model whose videos in GET /api/models/ have last_image"),
        ("optional", False, True, "image", "send image too"),
        ("required", False, True, "image", "send image too"),
        ("required", True, False, "last_image", "send last_image too"),
    ],
)
def test_a_frame_that_the_model_cannot_take_or_lacks_is_named(
    last_image: LastImage | None, first: bool, last: bool, param: str, says: str
) -> None:
    with pytest.raises(BadRequest, match=says) as refused:
        resolved(last_image, png() if first else None, png() if last else None)

    assert refused.value.param == param


@pytest.mark.parametrize(
    ("last_image", "first", "last", "task"),
    [
        ("optional", True, True, Task.i2v),
        ("optional", True, False, Task.i2v),
        ("optional", False, False, Task.t2v),
        ("required", True, True, Task.i2v),
        ("required", False, False, Task.t2v),
        ("alone", False, True, Task.i2v),
    ],
)
def test_a_request_with_the_frames_of_its_card_is_taken(
    last_image: LastImage, first: bool, last: bool, task: Task
) -> None:
    once = resolved(last_image, png() if first else None, png() if last else None)

    assert once.request.task is task
    assert once.adjustments == ()
    assert denoising_steps(once.request, card(last_image)) == once.request.num_inference_steps
    assert resolve(once.request, card(last_image), fresh_seed=9).request == once.request
    assert ResolvedRequest.model_validate_json(once.request.model_dump_json()) == once.request


def test_a_model_without_i2v_refuses_a_last_frame_by_its_name() -> None:
    request = GenerationRequest(model=WAN.id, prompt="a circle", video=Video(last_image=png()))

    with pytest.raises(BadRequest, match="cannot do i2v") as refused:
        resolve(request, WAN, fresh_seed=1)

    assert refused.value.param == "last_image"


def test_a_last_frame_of_another_shape_is_fitted_with_a_warning() -> None:
    request, adjustments = resolved("optional", png(64, 64), png(96, 48), width=64)

    assert [(one.code, one.param) for one in adjustments] == [("input_fitted", "last_image")]
    assert "last_image is 96x48" in adjustments[0].message
    inputs = decode_inputs(request, {}, None)
    assert inputs.image is not None
    assert inputs.last_image is not None
    assert inputs.image.size == inputs.last_image.size == (64, 64)


def test_the_size_follows_a_last_frame_that_is_alone() -> None:
    request, adjustments = resolved("alone", None, png(96, 64))

    assert (request.width, request.height) == (96, 64)
    assert adjustments == ()


def test_a_file_names_its_last_frame_by_digest_and_its_manifest_has_it() -> None:
    request, _ = resolved("alone", None, png())
    digest = hashlib.sha256(png()).hexdigest()

    facts = still.metadata(request, 1, "1.0", 0.5)
    text = still.a1111_parameters(request, 1, "1.0")

    assert facts["video"]["last_image"] == digest  # type: ignore[index]
    assert f"Last frame: {digest[:12]}" in text
    assert list(given_pictures(request)) == [("last frame", png())]
    assert digital_source_type(request).endswith("compositeWithTrainedAlgorithmicMedia")


def test_a_frame_wise_video_promises_no_last_frame() -> None:
    with pytest.raises(ValueError, match="a frame-wise video takes no last frame"):
        Videos(
            num_frames=9, fps=8, max_frames=9, max_frame_pixels=10**6, framewise=True, last_image="optional"
        )
