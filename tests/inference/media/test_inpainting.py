"""What the pipeline sees of an inpainting and what becomes of its pictures, for any size, area and growth.

The pipeline is stood for by a picture of one colour that the given one does not have.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from deployments.executors.inputs import decode_inputs
from deployments.media.inpainting import prepare
from deployments.pipelines.framewise import VideoFrame
from deployments.protocol.card import load_card
from deployments.protocol.request import Control, Edit, GenerationRequest, Grow, ResolvedEdit, ResolvedVideo
from deployments.validation.resolve import resolve
from tests.inference.video_files import ROOT

CARD = load_card(ROOT / "configs/models/tiny-flux-schnell.yaml")
NEW = (255, 0, 255)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def photo(width: int, height: int) -> Image.Image:
    """Greens and browns: no pixel is like NEW."""
    channels = [Image.effect_noise((width, height), 60).point(lambda value: value // 2) for _ in range(3)]
    return Image.merge("RGB", channels)


def rectangle(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def resolved(edit: Edit, **changes: Any) -> tuple[ResolvedEdit, tuple[int, int]]:
    """The edit as a replica gets it, and the size that the model works at."""
    facts = {"model": CARD.id, "prompt": "a fox", "edit": edit} | changes
    request = resolve(GenerationRequest(**facts), CARD, fresh_seed=1).request
    assert request.edit is not None
    return request.edit, (request.width, request.height)


def within(mask: Image.Image, feather: int) -> npt.NDArray[np.bool_]:
    return np.asarray(mask.filter(ImageFilter.MaxFilter(2 * feather + 1))) > 0


sides = st.integers(16, 150)
growth = st.integers(0, 40)


@settings(max_examples=60)
@given(data=st.data(), width=sides, height=sides, feather=st.integers(0, 12), only_masked=st.booleans())
def test_every_byte_outside_is_kept_and_every_marked_pixel_is_new(
    data: st.DataObject, width: int, height: int, feather: int, only_masked: bool
) -> None:
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = left, top, data.draw(st.integers(left, width - 1)), data.draw(st.integers(top, height - 1))
    grown = data.draw(st.tuples(growth, growth, growth, growth))
    source, mask = photo(width, height), rectangle((width, height), box)
    edit, size = resolved(
        Edit(
            image=png(source),
            mask_image=png(mask),
            feather=feather,
            only_masked=only_masked,
            only_masked_padding=data.draw(st.integers(0, 40)),
            grow=Grow(left=grown[0], right=grown[1], top=grown[2], bottom=grown[3]) if any(grown) else None,
        )
    )

    inpainting = prepare(edit, size, "crop")

    assert inpainting.image.size == inpainting.mask.size == size
    assert inpainting.paste_back is not None
    result = np.asarray(inpainting.paste_back.pictures([Image.new("RGB", size, NEW)])[0])
    canvas, marked = np.zeros_like(result), np.ones(result.shape[:2], np.uint8)
    inside = np.s_[grown[2] : grown[2] + height, grown[0] : grown[0] + width]
    canvas[inside], marked[inside] = np.asarray(source), np.asarray(mask) > 0
    assert result.shape == (height + grown[2] + grown[3], width + grown[0] + grown[1], 3)
    assert (result[marked > 0] == NEW).all()
    kept = ~within(Image.fromarray(marked * 255), feather)
    assert (result[kept] == canvas[kept]).all()
    assert (np.asarray(inpainting.mask) > 0).any(), "the pipeline has something to do"
    rough = Image.new("RGB", (size[0] // 8, size[1] // 8), NEW)
    preview = inpainting.paste_back.preview(rough)
    assert max(preview.size) == min(256, max(result.shape[:2]))


def test_the_feather_falls_smoothly_and_evenly() -> None:
    source = Image.new("RGB", (100, 40))
    edit, size = resolved(
        Edit(image=png(source), mask_image=png(rectangle((100, 40), (50, 0, 99, 39))), feather=20)
    )

    pasted = prepare(edit, size, "crop").paste_back
    assert pasted is not None
    (picture,) = pasted.pictures([Image.new("RGB", size, (255, 255, 255))])
    row = np.asarray(picture)[20, :, 0].astype(int)

    assert row[29] == 0, "the 21st pixel"
    assert (row[50:] == 255).all()
    steps = np.diff(row[29:51])
    assert (steps > 0).all()
    assert steps.max() <= 20, "of 255"


def test_strength_zero_gives_the_picture_itself() -> None:
    source, mask = photo(150, 90), rectangle((150, 90), (20, 20, 40, 40))
    edit, size = resolved(Edit(image=png(source), mask_image=png(mask), only_masked=True, strength=0.0))

    inpainting = prepare(edit, size, "crop")

    assert inpainting.paste_back is not None
    assert inpainting.paste_back.pictures([inpainting.image])[0].tobytes() == source.tobytes()


def test_a_large_picture_is_not_kept_while_its_request_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    source, mask = photo(150, 90), rectangle((150, 90), (20, 20, 40, 40))
    edit, size = resolved(Edit(image=png(source), mask_image=png(mask), grow=Grow(left=8)))
    kept = prepare(edit, size, "crop").paste_back
    monkeypatch.setattr("deployments.media.inpainting.KEPT_PIXELS", 1000)

    restored = prepare(edit, size, "crop").paste_back

    assert kept is not None
    assert restored is not None
    assert kept.canvas() is kept.canvas()
    assert restored.canvas() is not restored.canvas()
    new = Image.new("RGB", size, NEW)
    one, other = kept.pictures([new, new]), restored.pictures([new, new])
    assert [picture.tobytes() for picture in one] == [picture.tobytes() for picture in other]


def test_a_grown_picture_is_mirrored_into_the_new_area() -> None:
    source = Image.new("RGB", (64, 64), (200, 30, 30))
    edit, size = resolved(Edit(image=png(source), grow=Grow(left=64)))

    inpainting = prepare(edit, size, "crop")

    assert inpainting.image.getpixel((10, 32)) == (200, 30, 30)
    assert (edit.result_width, edit.result_height, edit.strength) == (128, 64, 1.0)


@pytest.mark.parametrize(
    ("changes", "strength"),
    [
        ({"mask_channel": "alpha"}, 1.0),
        ({"mask_channel": "alpha", "strength": 0.5}, 0.5),
        ({}, CARD.strength),
    ],
    ids=str,
)
def test_what_is_transparent_has_nothing_to_begin_with(changes: dict[str, Any], strength: float) -> None:
    edit, _ = resolved(Edit(image=png(photo(64, 64)), **changes))

    assert edit.strength == strength


# --- beside masks -------------------------------------------------------------------------------------------


def test_control_maps_show_the_area_that_is_generated() -> None:
    lines = Image.new("RGB", (200, 100))
    ImageDraw.Draw(lines).rectangle((110, 10, 150, 50), outline=(255, 255, 255), width=3)
    edit, size = resolved(
        Edit(
            image=png(photo(200, 100)),
            mask_image=png(rectangle((200, 100), (110, 10, 150, 50))),
            only_masked=True,
            only_masked_padding=0,
            feather=0,
        )
    )
    request = resolve(
        GenerationRequest(model=CARD.id, prompt="a fox", edit=edit), CARD, fresh_seed=1
    ).request.model_copy(
        update={
            "edit": edit,
            "width": size[0],
            "height": size[1],
            "controls": (Control(image=png(lines), type="canny", is_map=True),),
        }
    )

    (control,) = decode_inputs(request, {}, None).control_maps

    assert control.size == size
    edge = np.asarray(control.convert("L"))
    assert min(edge[2].mean(), edge[-3].mean(), edge[:, 2].mean(), edge[:, -3].mean()) > 200, "all around"
    assert edge[40:-40, 40:-40].max() == 0


def test_a_camera_that_moves_over_a_picture_of_another_shape_does_not_distort_it() -> None:
    wide = Image.new("RGB", (300, 100))
    ImageDraw.Draw(wide).ellipse((125, 25, 174, 74), fill=(255, 255, 255))
    video = ResolvedVideo(num_frames=2, fps=8, zoom=1.0, framewise=True)
    request = resolve(
        GenerationRequest(model=CARD.id, prompt="a fox", edit=Edit(image=png(wide)), width=128, height=128),
        CARD,
        fresh_seed=1,
    ).request

    view = decode_inputs(request, {}, VideoFrame(video, 0)).image

    assert view is not None
    left, top, right, bottom = (
        view.convert("L").point(lambda value: 255 * (value > 128)).getbbox() or (0,) * 4
    )
    assert right - left == pytest.approx(bottom - top, abs=2)
    assert right - left == pytest.approx(64, abs=3)
