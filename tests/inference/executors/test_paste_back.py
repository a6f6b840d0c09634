"""Inpainting with the model of every family that can: what the mask keeps comes back byte for byte."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageFilter

from deployments.protocol.card import ModelCard, Weights, load_card
from deployments.protocol.events import Artifact, Done, Event, Failed, Preview
from deployments.protocol.request import Edit, GenerationRequest, Grow, OutputOptions
from deployments.replica import ModelReplica
from tests.inference import tiny
from tests.inference.video_files import ROOT

Pixels = npt.NDArray[np.int16]
SHIPPED = load_card(ROOT / "configs/models/tiny-flux-schnell.yaml")
SD15 = load_card(ROOT / "configs/models/tiny-sd15.yaml")
SDXL = load_card(ROOT / "configs/models/tiny-sdxl-base.yaml")
RANDOM: Mapping[str, tuple[ModelCard, Callable[[], Any]]] = {"sd": (SD15, tiny.sd), "sdxl": (SDXL, tiny.sdxl)}
STEPS = 4


@pytest.fixture(scope="module", params=["flux", "sd", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelReplica]:
    card = SHIPPED
    if request.param in RANDOM:  # those that ship have latents that diffusers does not inpaint
        base, build = RANDOM[request.param]
        folder = tmp_path_factory.mktemp(request.param)
        build().save_pretrained(folder)
        weights = Weights(path=str(folder), dtype="float32")
        tasks = ["t2i", "i2i", "inpaint"]
        small = base.sizes.model_copy(update={"max": 128, "max_pixels": 128 * 128})
        card = base.model_copy(update={"weights": weights, "tasks": tasks, "videos": None, "sizes": small})
    serving = card.serving.model_copy(update={"warm_up": False})
    made = ModelReplica([card.model_copy(update={"serving": serving})])
    yield made
    made.__del__()


@pytest.fixture(scope="module")
def flux() -> Iterator[ModelReplica]:
    serving = SHIPPED.serving.model_copy(update={"warm_up": False})
    made = ModelReplica([SHIPPED.model_copy(update={"serving": serving})])
    yield made
    made.__del__()


def photo(width: int, height: int) -> Image.Image:
    """Noise on a gradient: no VAE gives it back as it is."""
    gradient = Image.radial_gradient("L").resize((width, height))
    noise = [Image.effect_noise((width, height), 60) for _ in range(3)]
    return Image.merge("RGB", [Image.blend(gradient, channel, 0.5) for channel in noise])


def rectangle(width: int, height: int, *box: int) -> Image.Image:
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def png(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(picture: Image.Image) -> Pixels:
    return np.asarray(picture.convert("RGB"), dtype=np.int16)


def within(mask: Image.Image, feather: int) -> npt.NDArray[np.bool_]:
    """The pixels that may change: the mask and a square of `feather` pixels around each of its own."""
    marked = mask.point(lambda value: 255 * (value >= 128))
    return np.asarray(marked.filter(ImageFilter.MaxFilter(2 * feather + 1))) > 0


async def events_of(replica: ModelReplica, edit: Edit, **changes: Any) -> list[Event]:
    facts = {
        "model": next(iter(replica._cards)),
        "prompt": "a red circle",
        "seed": 5,
        "num_inference_steps": STEPS,
        "edit": edit,
    }
    return [event async for event in replica.generate(GenerationRequest(**(facts | changes)))]


async def results_of(replica: ModelReplica, edit: Edit, **changes: Any) -> list[Image.Image]:
    events = await events_of(replica, edit, **changes)
    assert isinstance(events[-1], Done), events[-1]
    files = [event for event in events if isinstance(event, Artifact) and event.kind == "image"]
    pictures = [Image.open(io.BytesIO(file.data)) for file in files]
    assert [(file.width, file.height) for file in files] == [picture.size for picture in pictures]
    return pictures


SIZES = {"as the model works": (128, 96), "odd": (101, 77), "small": (40, 33), "large": (413, 300)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
async def test_outside_of_mask_and_feather_every_byte_is_the_sources(
    model: ModelReplica, size: tuple[int, int]
) -> None:
    source = photo(*size)
    mask = rectangle(*size, size[0] // 3, size[1] // 3, size[0] // 2, size[1] // 2)

    pictures = await results_of(model, Edit(image=png(source), mask_image=png(mask), feather=3), num_images=2)

    may_change = within(mask, 3)
    for picture in pictures:
        assert picture.size == size
        changed = (pixels(picture) != pixels(source)).any(axis=2)
        assert not (changed & ~may_change).any()
        assert changed[np.asarray(mask) > 0].mean() > 0.9, "what is marked is new"
    one, other = (pixels(picture)[np.asarray(mask) > 0] for picture in pictures)
    assert (one != other).any(), "each has its own seed"


async def test_a_size_asked_for_scales_the_source_and_keeps_it(flux: ModelReplica) -> None:
    source, mask = photo(256, 192), rectangle(256, 192, 20, 20, 90, 90)

    (picture,) = await results_of(flux, Edit(image=png(source), mask_image=png(mask)), width=128, height=96)

    scaled = source.resize((128, 96), Image.Resampling.LANCZOS)
    small = rectangle(128, 96, 10, 10, 45, 45)
    assert (pixels(picture) == pixels(scaled))[~within(small, 9)].all()


@pytest.mark.parametrize("ratio", [0.5, 2, 3], ids=["smaller", "larger", "three times"])
async def test_a_mask_of_another_size_marks_the_same_part(flux: ModelReplica, ratio: float) -> None:
    source, mask = photo(96, 64), rectangle(96, 64, 32, 16, 63, 47)
    given = mask.resize((round(96 * ratio), round(64 * ratio)), Image.Resampling.NEAREST)

    (picture,) = await results_of(flux, Edit(image=png(source), mask_image=png(given), feather=2))

    assert picture.size == (96, 64)
    assert (pixels(picture) == pixels(source))[~within(mask, 2)].all()


async def test_a_soft_mask_counts_from_the_middle_grey_and_its_edge_is_smooth(flux: ModelReplica) -> None:
    source = photo(128, 64)
    mask = Image.linear_gradient("L").rotate(90).resize((128, 64))

    edit = Edit(image=png(source), mask_image=png(mask), feather=16, strength=1.0)
    (picture,) = await results_of(flux, edit)

    changed = np.abs(pixels(picture) - pixels(source)).mean(axis=(0, 2))
    may_change = within(mask, 16).any(axis=0)
    assert changed[~may_change].max() == 0
    columns = np.flatnonzero(may_change)
    edge = columns[:16] if not may_change[0] else columns[-16:][::-1]  # from the kept side inwards
    quarters = changed[edge].reshape(4, 4).mean(axis=1)
    assert (np.diff(quarters) > 0).all(), "more and more of the new picture"


async def test_a_black_mask_gives_the_source_and_a_warning(model: ModelReplica) -> None:
    source = photo(96, 64)
    edit = Edit(image=png(source), mask_image=png(Image.new("L", (96, 64))))

    events = await events_of(model, edit)
    (picture,) = await results_of(model, edit)

    assert np.array_equal(pixels(picture), pixels(source))
    assert [(w.code, w.param) for w in events[-1].warnings] == [("mask_empty", "mask_image")]


async def test_a_white_mask_is_a_warning(flux: ModelReplica) -> None:
    edit = Edit(image=png(photo(96, 64)), mask_image=png(Image.new("L", (96, 64), 255)))

    events = await events_of(flux, edit)

    assert [(w.code, w.param) for w in events[-1].warnings] == [("mask_full", "mask_image")]


async def test_a_mask_with_both_parts_has_no_warning(flux: ModelReplica) -> None:
    edit = Edit(image=png(photo(96, 64)), mask_image=png(rectangle(96, 64, 0, 0, 40, 40)))

    assert (await events_of(flux, edit))[-1].warnings == ()


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
async def test_every_format_comes_from_the_same_pixels(flux: ModelReplica, form: Any) -> None:
    source = Image.radial_gradient("L").resize((96, 64)).convert("RGB")
    mask = rectangle(96, 64, 32, 16, 63, 47)
    edit = Edit(image=png(source), mask_image=png(mask))

    (picture,) = await results_of(flux, edit, output=OutputOptions(format=form, quality=95))

    off = np.abs(pixels(picture) - pixels(source))[~within(mask, 24)]
    assert off.max() <= (0 if form == "png" else 12)


async def test_without_paste_back_the_models_own_picture_comes(flux: ModelReplica) -> None:
    source, mask = photo(128, 96), rectangle(128, 96, 40, 40, 80, 80)

    (raw,) = await results_of(
        flux, Edit(image=png(source), mask_image=png(mask), paste_back=False, strength=1.0)
    )
    (pasted,) = await results_of(flux, Edit(image=png(source), mask_image=png(mask), strength=1.0))

    assert (pixels(raw) != pixels(source))[~within(mask, 8)].mean() > 0.9
    inside = np.asarray(mask) > 0
    assert np.array_equal(pixels(raw)[inside], pixels(pasted)[inside]), "the same denoising"


async def test_a_thin_stroke_is_not_lost_between_the_latents(model: ModelReplica) -> None:
    source, mask = photo(128, 96), rectangle(128, 96, 41, 10, 41, 80)

    (picture,) = await results_of(
        model, Edit(image=png(source), mask_image=png(mask), feather=0, strength=1.0)
    )

    changed = np.abs(pixels(picture) - pixels(source)).max(axis=2)
    assert (changed[10:81, 41] > 0).mean() > 0.9
    assert changed.sum() == changed[10:81, 41].sum(), "nothing but the stroke"


# --- only the masked area -----------------------------------------------------------------------------------


async def test_the_masked_area_alone_is_generated_at_the_full_size(model: ModelReplica) -> None:
    source, mask = photo(301, 223), rectangle(301, 223, 40, 50, 71, 81)
    edit = Edit(
        image=png(source),
        mask_image=png(mask),
        only_masked=True,
        only_masked_padding=8,
        feather=4,
        strength=1.0,
    )

    events = await events_of(model, edit)

    (file,) = (event for event in events if isinstance(event, Artifact) and event.kind == "image")
    assert (file.width, file.height) == (301, 223)
    assert (file.metadata["width"], file.metadata["height"]) == (128, 128), "what the model worked at"
    changed = (pixels(Image.open(io.BytesIO(file.data))) != pixels(source)).any(axis=2)
    assert not (changed & ~within(mask, 4)).any()
    assert changed[np.asarray(mask) > 0].mean() > 0.9


@pytest.mark.parametrize("box", [(0, 0, 3, 3), (90, 60, 95, 63), (0, 20, 95, 22), (50, 0, 50, 63)], ids=str)
async def test_an_area_at_the_edge_or_of_a_long_shape_is_in_its_place(
    flux: ModelReplica, box: tuple[int, ...]
) -> None:
    source, mask = photo(96, 64), rectangle(96, 64, *box)
    edit = Edit(
        image=png(source),
        mask_image=png(mask),
        only_masked=True,
        only_masked_padding=0,
        feather=2,
        strength=1.0,
    )

    (picture,) = await results_of(flux, edit)

    changed = (pixels(picture) != pixels(source)).any(axis=2)
    assert not (changed & ~within(mask, 2)).any()
    assert changed[np.asarray(mask) > 0].mean() > 0.8


async def test_an_area_generated_alone_shows_its_surroundings_in_place(flux: ModelReplica) -> None:
    """With strength 0 the pipeline gives its input back: what is cut out must fit where it is put."""
    source, mask = photo(200, 140), rectangle(200, 140, 30, 30, 90, 70)
    smooth = source.filter(ImageFilter.GaussianBlur(6))

    edit = Edit(image=png(smooth), mask_image=png(mask), only_masked=True, strength=0.3)
    (picture,) = await results_of(flux, edit)

    assert np.abs(pixels(picture) - pixels(smooth))[np.asarray(mask) > 0].mean() < 30, "of 255"


# --- growing ------------------------------------------------------------------------------------------------


async def test_a_picture_grows_on_the_sides_asked_for(model: ModelReplica) -> None:
    source = photo(70, 50)
    edit = Edit(image=png(source), grow=Grow(left=20, right=7, top=0, bottom=31), feather=4)

    (picture,) = await results_of(model, edit)

    assert picture.size == (97, 81)
    inner = pixels(picture)[:50, 20:90]
    assert np.array_equal(inner[:46, 4:66], pixels(source)[:46, 4:66]), "kept outside of the feather"
    assert not np.array_equal(inner[:, :4], pixels(source)[:, :4]), "the feather lies in the picture"


async def test_a_picture_grows_and_changes_where_it_is_masked(flux: ModelReplica) -> None:
    source, mask = photo(64, 64), rectangle(64, 64, 0, 0, 20, 20)
    edit = Edit(image=png(source), mask_image=png(mask), grow=Grow(right=32), feather=0, strength=1.0)

    (picture,) = await results_of(flux, edit)

    changed = (pixels(picture)[:, :64] != pixels(source)).any(axis=2)
    assert np.array_equal(changed, changed & (np.asarray(mask) > 0))
    assert changed[:21, :21].mean() > 0.9


async def test_a_picture_may_not_grow_without_end(flux: ModelReplica) -> None:
    (failed,) = await events_of(flux, Edit(image=png(photo(64, 64)), grow=Grow(right=8000, bottom=8000)))

    assert isinstance(failed, Failed)
    assert (failed.kind, failed.param) == ("too_large", "grow")


# --- meanings of masks --------------------------------------------------------------------------------------


def hole(width: int, height: int, *box: int) -> Image.Image:
    """A picture whose transparent rectangle is to be edited, in OpenAI's meaning."""
    picture = photo(width, height).convert("RGBA")
    picture.putalpha(rectangle(width, height, *box).point(lambda value: 255 - value))
    return picture


async def test_white_strokes_on_transparent_white_are_the_mask(flux: ModelReplica) -> None:
    source, mask = photo(96, 64), rectangle(96, 64, 32, 16, 63, 47)
    strokes = Image.merge("LA", [Image.new("L", (96, 64), 255), mask]).convert("RGBA")

    (picture,) = await results_of(flux, Edit(image=png(source), mask_image=png(strokes), feather=2))

    changed = (pixels(picture) != pixels(source)).any(axis=2)
    assert not (changed & ~within(mask, 2)).any()
    assert changed[np.asarray(mask) > 0].mean() > 0.9


@pytest.mark.parametrize("own", [False, True], ids=["of the mask", "of the picture"])
async def test_by_alpha_the_transparent_part_is_edited(flux: ModelReplica, own: bool) -> None:
    holed = hole(96, 64, 32, 16, 63, 47)
    source = holed if own else photo(96, 64)
    edit = Edit(
        image=png(source),
        mask_image=None if own else png(holed),
        mask_channel="alpha",
        feather=2,
        strength=1.0,
    )

    (picture,) = await results_of(flux, edit)

    mask = rectangle(96, 64, 32, 16, 63, 47)
    changed = (pixels(picture) != pixels(source.convert("RGB"))).any(axis=2)
    assert not (changed & ~within(mask, 2)).any()
    assert changed[np.asarray(mask) > 0].mean() > 0.9


async def test_a_picture_without_transparency_edits_nothing_by_alpha(flux: ModelReplica) -> None:
    events = await events_of(flux, Edit(image=png(photo(96, 64)), mask_channel="alpha"))

    assert [(w.code, w.param) for w in events[-1].warnings] == [("mask_empty", "image")]
    assert "transparent" in events[-1].warnings[0].message


@pytest.mark.parametrize("masked", [False, True])
async def test_a_transparent_picture_becomes_white_with_a_warning(flux: ModelReplica, masked: bool) -> None:
    mask = png(rectangle(96, 64, 0, 0, 10, 10)) if masked else None
    source = hole(96, 64, 32, 16, 63, 47)

    holed = await events_of(flux, Edit(image=png(source), mask_image=mask))
    opaque = await events_of(flux, Edit(image=png(source.convert("RGB")), mask_image=mask))

    assert [(w.code, w.param) for w in holed[-1].warnings] == [("transparency_removed", "image")]
    assert opaque[-1].warnings == ()


# --- previews, batches, refusals ----------------------------------------------------------------------------


async def test_previews_show_the_new_part_in_the_given_picture(flux: ModelReplica) -> None:
    source = Image.new("RGB", (200, 120), (10, 200, 30))
    mask = rectangle(200, 120, 100, 0, 199, 119)
    edit = Edit(image=png(source), mask_image=png(mask), strength=1.0, feather=0)

    events = await events_of(flux, edit, output=OutputOptions(previews=2))

    previews = [Image.open(io.BytesIO(e.data)) for e in events if isinstance(e, Preview)]
    assert previews
    for preview in previews:
        assert preview.size == (200, 120)
        assert np.abs(pixels(preview)[:, :90] - (10, 200, 30)).mean() < 12, "as sent, but for WebP"
        assert np.abs(pixels(preview)[:, 110:] - (10, 200, 30)).mean() > 12


async def test_a_large_picture_has_small_previews(flux: ModelReplica) -> None:
    source, mask = photo(900, 500), rectangle(900, 500, 100, 100, 300, 300)
    edit = Edit(image=png(source), mask_image=png(mask), only_masked=True)

    events = await events_of(flux, edit, output=OutputOptions(previews=1))

    (preview,) = (e for e in events if isinstance(e, Preview))
    assert Image.open(io.BytesIO(preview.data)).size == (256, 142)


async def test_requests_with_and_without_masks_share_a_batch_and_no_bits(flux: ModelReplica) -> None:
    source, mask = photo(128, 128), rectangle(128, 128, 40, 40, 80, 80)
    edits = [
        Edit(image=png(source), mask_image=png(mask), strength=1.0),
        Edit(image=png(source), mask_image=png(mask), strength=1.0, only_masked=True),
        Edit(image=png(source), grow=Grow(right=16), strength=1.0),
        Edit(image=png(source), strength=1.0),
    ]

    together = await asyncio.gather(*(results_of(flux, edit) for edit in edits))

    for edit, pictures in zip(edits, together, strict=True):
        (alone,) = await results_of(flux, edit)
        assert np.abs(pixels(alone) - pixels(pictures[0])).max() <= 1


@pytest.mark.parametrize(
    ("edit", "param"),
    [
        (Edit(image=png(photo(64, 64)), feather=3), "feather"),
        (Edit(image=png(photo(64, 64)), only_masked=True), "only_masked"),
        (
            Edit(image=png(photo(64, 64)), grow=Grow(left=8), only_masked=True, paste_back=False),
            "only_masked",
        ),
    ],
    ids=["a feather of nothing", "an area of nothing", "an area that is put nowhere"],
)
async def test_options_that_mean_nothing_are_refused(flux: ModelReplica, edit: Edit, param: str) -> None:
    (failed,) = await events_of(flux, edit)

    assert isinstance(failed, Failed)
    assert (failed.kind, failed.param) == ("bad_request", param)
