"""Edits by reference pictures against a card: how many, how large, and how large the result is."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, TooLarge
from deployments.protocol.request import Control, Edit, GenerationRequest, Task, Video
from deployments.validation.resolve import Resolved, denoising_steps, resolve

FACTS: dict[str, Any] = {
    "id": "retouch",
    "name": "Retouch",
    "family": "flux",
    "weights": {"path": "models/retouch"},
    "tasks": ["edit"],
    "steps": {"min": 1, "default": 8, "max": 50},
    "guidance": {"min": 0.0, "default": 2.5, "max": 10.0},
    "sizes": {"width": 128, "height": 128, "multiple": 16, "min": 64, "max": 512, "max_pixels": 131072},
    "references": {"max": 2, "max_pixels": 100_000},
    "licence": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
}
CARD = ModelCard.model_validate(FACTS)
PAINTER = ModelCard.model_validate(FACTS | {"tasks": ["t2i"], "references": None})


@cache
def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height), 128).save(buffer, "PNG")
    return buffer.getvalue()


def edit(*sizes: tuple[int, int], card: ModelCard = CARD, **changes: Any) -> Resolved:
    references = tuple(png(*size) for size in sizes)
    facts: dict[str, Any] = {"model": "retouch", "prompt": "make it blue", "references": references}
    return resolve(GenerationRequest(**(facts | changes)), card, fresh_seed=7)


def refusal(*sizes: tuple[int, int], **changes: Any) -> BadRequest | TooLarge:
    with pytest.raises((BadRequest, TooLarge)) as caught:
        edit(*sizes, **changes)
    return caught.value


def test_an_edit_runs_all_of_its_steps() -> None:
    request, adjustments = edit((128, 128), (64, 64))

    assert request.task is Task.edit
    assert denoising_steps(request, CARD) == 8
    assert len(request.references) == 2
    assert adjustments == ()


def test_a_resolved_edit_resolves_to_itself() -> None:
    request = edit((300, 200)).request

    assert resolve(request, CARD, fresh_seed=1) == Resolved(request, ())


def test_a_model_without_the_task_refuses_reference_pictures() -> None:
    error = refusal((128, 128), card=PAINTER)

    assert error.param == "reference_images"
    assert error.message == "retouch cannot do edit; it can do t2i"


def test_more_pictures_than_the_card_allows_are_refused() -> None:
    error = refusal((128, 128), (128, 128), (128, 128))

    assert error.param == "reference_images"
    assert error.message == "there are 3 reference pictures; retouch takes at most 2"


def test_no_model_takes_more_than_ten() -> None:
    with pytest.raises(ValidationError, match="at most 10"):
        GenerationRequest(model="any", prompt="x", references=(png(64, 64),) * 11)


def test_a_picture_of_too_many_pixels_is_refused_by_name() -> None:
    error = refusal((128, 128), (400, 300))

    assert isinstance(error, TooLarge)
    assert error.param == "reference_images.1"
    assert error.message == (
        "reference_images.1 is 400x300, 0.12 megapixels; retouch takes at most 0.10 for each: send a smaller "
        "one"
    )


def test_a_picture_that_is_too_long_is_refused() -> None:
    error = refusal((500, 100))

    assert (error.param, "at most 4 to 1" in error.message) == ("reference_images", True)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"edit": Edit(image=png(64, 64))}, "image"),
        ({"controls": (Control(image=png(64, 64), type="canny"),)}, "controls"),
        ({"video": Video()}, "video"),
    ],
)
def test_reference_pictures_stand_alone(changes: dict[str, Any], param: str) -> None:
    tasks = {"tasks": ["edit", "i2i", "t2v"], "videos": {"num_frames": 1, "fps": 8, "max_frames": 9}}
    tasks["videos"] |= {"max_frame_pixels": 10**6}  # type: ignore[operator]
    error = refusal((64, 64), card=ModelCard.model_validate(FACTS | tasks), **changes)

    assert error.param == param
    assert f"leave {param} out" in error.message


@pytest.mark.parametrize(
    ("first", "size"),
    [((128, 128), (128, 128)), ((300, 200), (160, 112)), ((64, 64), (128, 128)), ((200, 300), (112, 160))],
)
def test_the_result_has_the_shape_of_the_first_picture_at_the_models_area(
    first: tuple[int, int], size: tuple[int, int]
) -> None:
    request, adjustments = edit(first, (90, 60))

    assert (request.width, request.height) == size
    assert [adjustment.code for adjustment in adjustments] == (["size_fitted"] if first != size else [])


def test_a_changed_size_is_reported_with_both_sizes() -> None:
    (adjustment,) = edit((300, 200)).adjustments

    assert adjustment.param == "width"
    assert adjustment.message == (
        "the first reference picture is 300x200; the result is 160x112, about as large as the model was "
        "trained for; width and height choose another size"
    )


def test_the_requests_own_size_comes_first() -> None:
    request, adjustments = edit((300, 200), width=192, height=64)

    assert (request.width, request.height, adjustments) == (192, 64, ())


def test_one_side_follows_the_first_picture() -> None:
    assert edit((300, 200), width=192).request.height == 128


@pytest.mark.parametrize("changes", [{"references": None}, {"tasks": ["t2i"]}])
def test_a_card_names_the_task_and_its_limits_together(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="task edit needs the limits in references"):
        ModelCard.model_validate(FACTS | changes)
