"""Pictures of another aspect ratio than the result."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from deployments.media.fitting import contained, fitted, fitted_mask
from deployments.protocol.card import load_card
from deployments.protocol.request import Edit, FitMode, GenerationRequest, Grow
from deployments.validation.resolve import resolve
from tests.inference.video_files import ROOT

CARD = load_card(ROOT / "configs/models/tiny-flux-schnell.yaml")
# three stripes: 40 red columns, 20 green ones, 40 blue ones
STRIPES = Image.fromarray(
    np.repeat(np.array([[(255, 0, 0)] * 40 + [(0, 255, 0)] * 20 + [(0, 0, 255)] * 40], np.uint8), 20, axis=0)
)
RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "PNG")
    return buffer.getvalue()


def row(picture: Image.Image, *xs: int, y: int) -> list[object]:
    return [picture.getpixel((x, y)) for x in xs]


def test_crop_keeps_the_middle_and_its_shape() -> None:
    square = fitted(STRIPES, (40, 40), "crop")

    assert row(square, 0, 20, 39, y=20) == [GREEN, GREEN, GREEN], "the middle 20x20 of 100x20"


def test_pad_keeps_everything_and_repeats_the_edge() -> None:
    square = fitted(STRIPES, (100, 100), "pad")

    assert row(square, 0, 50, 99, y=50) == [RED, GREEN, BLUE]
    assert row(square, 0, 50, 99, y=0) == [RED, GREEN, BLUE]


def test_maps_are_padded_with_black() -> None:
    square = fitted(STRIPES, (100, 100), "pad", black_border=True)

    assert row(square, 0, 50, 99, y=50) == [RED, GREEN, BLUE]
    assert row(square, 0, 50, 99, y=39) == [BLACK, BLACK, BLACK]


def test_stretch_keeps_everything_and_distorts_it() -> None:
    square = fitted(STRIPES, (100, 100), "stretch")

    for y in (0, 50, 99):
        assert row(square, 0, 50, 99, y=y) == [RED, GREEN, BLUE]


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_picture_of_the_same_shape_is_only_scaled(fit: FitMode) -> None:
    assert fitted(STRIPES, (100, 20), fit).tobytes() == STRIPES.tobytes()
    assert row(fitted(STRIPES, (50, 10), fit), 0, 25, 49, y=5) == [RED, GREEN, BLUE]
    assert fitted(STRIPES, (500, 101), fit).size == (500, 101), "a hundredth is the rounding of a grid"


@pytest.mark.parametrize(("fit", "ends"), [("crop", (255, 255)), ("pad", (0, 0)), ("stretch", (255, 255))])
def test_a_mask_is_fitted_as_its_picture_is(fit: FitMode, ends: tuple[int, int]) -> None:
    mask = fitted_mask(Image.new("L", (100, 20), 255), (100, 100), fit)

    assert (mask.getpixel((50, 50)), mask.getpixel((50, 0)), mask.getpixel((50, 99))) == (255, *ends)


def test_a_mask_that_is_enlarged_keeps_its_edge() -> None:
    mask = Image.new("L", (4, 4))
    mask.paste(255, (2, 0, 4, 4))

    large = np.asarray(fitted_mask(mask, (64, 64), "crop"))

    assert (large[:, :32] == 0).all()
    assert (large[:, 32:] == 255).all()


@pytest.mark.parametrize(
    ("size", "frame", "box"),
    [
        ((100, 50), (200, 100), (0, 0, 200, 100)),
        ((100, 50), (64, 64), (0, 16, 64, 48)),
        ((50, 100), (64, 64), (16, 0, 48, 64)),
        ((3000, 1), (64, 64), (0, 31, 64, 32)),
    ],
)
def test_a_whole_picture_lies_in_the_middle_of_its_frame(
    size: tuple[int, int], frame: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    assert contained(size, frame) == box


# --- warnings -----------------------------------------------------------------------------------------------


def warnings(**changes: object) -> list[tuple[str, str]]:
    facts = {"model": CARD.id, "prompt": "a fox"} | changes
    resolved = resolve(GenerationRequest(**facts), CARD, fresh_seed=1)
    assert resolve(resolved.request, CARD, fresh_seed=2) == (resolved.request, ()), "resolved already"
    return [(a.param, a.message) for a in resolved.adjustments if a.code == "input_fitted"]


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        ("crop", "was cropped to its middle 300x100"),
        ("pad", "was padded to 2000x667"),
        ("stretch", "was stretched"),
    ],
)
def test_a_picture_that_is_longer_than_the_model_allows_is_fitted_with_a_warning(
    fit: FitMode, words: str
) -> None:
    ((param, message),) = warnings(edit=Edit(image=png((2000, 100))), fit=fit)

    assert param == "image"
    assert "image is 2000x100" in message
    assert words in message


@pytest.mark.parametrize("size", [(128, 128), (500, 500), (192, 96), (1000, 500)])
def test_a_picture_of_the_right_shape_is_scaled_without_a_warning(size: tuple[int, int]) -> None:
    assert warnings(edit=Edit(image=png(size), mask_image=png((64, 64 * size[1] // size[0])))) == []
    assert warnings(edit=Edit(image=png(size)), width=128, height=128 * size[1] // size[0]) == []


def test_a_size_of_another_shape_than_the_picture_is_a_warning() -> None:
    ((param, message),) = warnings(edit=Edit(image=png((128, 128))), width=128, height=64)

    assert param == "image"
    assert "128x128, which has another aspect ratio than 128x64" in message
    assert "its middle 128x64" in message


def test_a_mask_of_another_shape_than_its_picture_is_a_warning() -> None:
    edit = Edit(image=png((128, 64)), mask_image=png((128, 128)))

    ((param, message),) = warnings(edit=edit, fit="pad")

    assert param == "mask_image"
    assert "padded to 256x128" in message


def test_a_picture_that_is_put_back_is_whole_whatever_its_shape() -> None:
    edit = Edit(image=png((2000, 100)), mask_image=png((2000, 100)))

    assert warnings(edit=edit) == []


def test_what_a_picture_grows_to_counts() -> None:
    edit = Edit(image=png((64, 128)), grow=Grow(left=32, right=32))

    assert warnings(edit=edit, width=128, height=128) == []
    assert len(warnings(edit=edit, width=64, height=128)) == 1
