"""A request and a card: blanks filled, adjustments reported, refusals that name cause and remedy."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from deployments.protocol.adjustment import Adjustment
from deployments.protocol.card import ModelCard, load_cards
from deployments.protocol.errors import BadRequest, TooLarge
from deployments.protocol.request import (
    MAX_SEED,
    Control,
    Edit,
    GenerationRequest,
    Lora,
    OutputOptions,
    ResolvedRequest,
    Task,
)
from deployments.validation.resolve import Resolved, denoising_steps, resolve

CARDS = load_cards(Path(__file__).parents[3] / "configs/models")
SCHNELL, DEV = CARDS["flux.1-schnell"], CARDS["flux.1-dev"]
SDXL, REFINER = CARDS["sdxl-base-1.0"], CARDS["sdxl-refiner-1.0"]
SD, DREAMSHAPER = CARDS["stable-diffusion-v1.5"], CARDS["dreamshaper-8"]
IMAGE_CARDS = [card for card in CARDS.values() if set(card.tasks) & set(Task)]
SEED = 7
many = settings(max_examples=60, deadline=None)


@cache
def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height), 128).save(buffer, "PNG")
    return buffer.getvalue()


def request_for(**changes: Any) -> GenerationRequest:
    return GenerationRequest(**({"model": "any", "prompt": "a red fox"} | changes))


def edit(width: int = 512, height: int = 512, **changes: Any) -> Edit:
    return Edit(image=png(width, height), **changes)


def control(kind: Any = "canny", width: int = 512, height: int = 512, **changes: Any) -> Control:
    return Control(image=png(width, height), type=kind, **changes)


def lora(number: int) -> Lora:
    return Lora(id=f"{number:064x}")


def resolved(card: ModelCard, **changes: Any) -> ResolvedRequest:
    return resolve(request_for(**changes), card, fresh_seed=SEED).request


def adjustments(card: ModelCard, **changes: Any) -> tuple[Adjustment, ...]:
    return resolve(request_for(**changes), card, fresh_seed=SEED).adjustments


def refusal(card: ModelCard, **changes: Any) -> BadRequest | TooLarge:
    with pytest.raises((BadRequest, TooLarge)) as caught:
        resolve(request_for(**changes), card, fresh_seed=SEED)
    return caught.value


# --- blanks -----------------------------------------------------------------------------------------------


def test_blanks_are_filled_from_the_card() -> None:
    request = resolved(SD)

    assert (request.width, request.height) == (512, 512)
    assert request.num_inference_steps == 30
    assert request.guidance_scale == 7.5
    assert request.scheduler == "auto"
    assert request.max_sequence_length is None
    assert request.seed == SEED
    assert request.model == SD.id
    assert request.output == OutputOptions()


def test_what_the_caller_says_within_the_limits_is_kept() -> None:
    said = {
        "width": 768,
        "height": 512,
        "num_inference_steps": 12,
        "guidance_scale": 3.0,
        "seed": 0,
        "scheduler": "euler_a",
        "negative_prompt": "blurry",
        "num_images": 2,
    }

    answer = resolve(request_for(**said), SD, fresh_seed=SEED)

    assert answer.request.model_dump(include=set(said)) == said
    assert answer.adjustments == ()


def test_the_cards_strength_fills_an_edit_without_one() -> None:
    request = resolved(REFINER, edit=edit())

    assert request.edit is not None
    assert request.edit.strength == REFINER.strength == 0.3


@pytest.mark.parametrize(
    ("given_size", "used"),
    [
        ((640, 480), (640, 480)),
        ((1000, 500), (992, 496)),
        ((3000, 1500), (1024, 512)),
        ((1600, 100), (768, 256)),
        ((64, 64), (256, 256)),
    ],
)
def test_without_a_size_the_given_pictures_own_is_used_as_far_as_the_card_lets_it(
    given_size: tuple[int, int], used: tuple[int, int]
) -> None:
    request = resolved(SD, edit=edit(*given_size))

    assert (request.width, request.height) == used


def test_without_a_size_the_first_control_pictures_own_is_used() -> None:
    request = resolved(SD, controls=[control(width=640, height=320), control("depth", 100, 100)])

    assert (request.width, request.height) == (640, 320)
    assert request.controls == (control(width=640, height=320), control("depth", 100, 100))


def test_an_edits_own_size_goes_before_that_of_a_control_picture() -> None:
    request = resolved(SD, edit=edit(512, 256), controls=[control(width=640, height=320)])

    assert (request.width, request.height) == (512, 256)


@pytest.mark.parametrize(("asked", "used"), [(True, 0.8), (0.6, 0.6), (False, None), (None, None)])
def test_the_card_says_when_the_refiner_takes_over(asked: Any, used: float | None) -> None:
    assert resolved(SDXL, refiner=asked).refiner == used


def test_a_depth_map_needs_no_model_that_finds_depth() -> None:
    request = resolved(CANNY_ONLY, controls=[control("depth", is_map=True)])

    assert request.controls[0].is_map is True


def test_refine_is_a_task_with_the_refiners_own_strength() -> None:
    request = resolved(REFINER, refine=True, edit=edit())

    assert request.task is Task.refine
    assert request.edit is not None
    assert request.edit.strength == 0.3
    assert denoising_steps(request, REFINER) == 9


def test_at_most_four_control_pictures_may_be_sent() -> None:
    with pytest.raises(ValueError, match="at most 4 items"):
        request_for(controls=[control()] * 5)


def test_a_size_that_was_asked_for_wins_over_the_given_pictures() -> None:
    request = resolved(SD, width=512, height=256, edit=edit(640, 480))

    assert (request.width, request.height) == (512, 256)


# --- corrections ------------------------------------------------------------------------------------------


def test_schnell_is_corrected_to_four_steps_with_a_warning() -> None:
    answer = resolve(request_for(num_inference_steps=30), SCHNELL, fresh_seed=SEED)

    assert answer.request.num_inference_steps == 4
    assert answer.adjustments == (
        Adjustment(
            "steps_corrected",
            "num_inference_steps",
            "FLUX requires exactly 4 steps. Overriding 30 -> 4",
        ),
    )


def test_schnell_runs_as_it_was_trained_whatever_was_asked() -> None:
    answer = resolve(
        request_for(
            num_inference_steps=1,
            guidance_scale=7.5,
            negative_prompt="blurry",
            scheduler="ddim",
            max_sequence_length=512,
        ),
        SCHNELL,
        fresh_seed=SEED,
    )

    request = answer.request
    assert (request.num_inference_steps, request.guidance_scale) == (4, 0.0)
    assert (request.negative_prompt, request.scheduler) == ("", "auto")
    assert request.max_sequence_length == 256
    assert [adjustment.param for adjustment in answer.adjustments] == [
        "num_inference_steps",
        "negative_prompt",
        "guidance_scale",
        "scheduler",
        "max_sequence_length",
    ]


def test_values_that_are_right_already_are_not_corrected() -> None:
    asked = {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 256}

    assert adjustments(SCHNELL, **asked) == ()


def test_dev_is_free_within_its_own_card() -> None:
    request = resolved(DEV, num_inference_steps=50, guidance_scale=2.0)

    assert (request.num_inference_steps, request.guidance_scale) == (50, 2.0)
    assert resolved(DEV).num_inference_steps == 30
    assert resolved(DEV).guidance_scale == 3.5


def test_a_shorter_text_length_is_raised_to_the_models_one_so_that_requests_share_forwards() -> None:
    reported = adjustments(DEV, max_sequence_length=128)

    assert [adjustment.code for adjustment in reported] == ["sequence_length_corrected"]
    assert "128 -> 512" in reported[0].message


# --- refusals ---------------------------------------------------------------------------------------------

CANNY_ONLY = SD.model_copy(
    update={
        "controls": {
            "canny": SD.controls["canny"],
            "depth": SD.controls["depth"].model_copy(update={"preprocessor": None}),
        }
    }
)
NO_LORAS = SD.model_copy(update={"serving": SD.serving.model_copy(update={"lora": "none"})})
ONE_LORA = SD.model_copy(update={"max_loras": 1})
REFUSALS: list[tuple[ModelCard, dict[str, Any], str, str, str]] = [
    # card, request, field at fault, cause, remedy
    (REFINER, {}, "model", "cannot do t2i", "can do i2i"),
    (SD, {"prompt": " \n"}, "prompt", "prompt is empty", "describe the picture"),
    (SD, {"prompt": "x" * 4001}, "prompt", "4001 characters", "at most 4000"),
    (SD, {"negative_prompt": "x" * 4001}, "negative_prompt", "4001 characters", "at most 4000"),
    (SD, {"num_images": 5}, "num_images", "num_images is 5", "at most 4"),
    (SD, {"width": 500, "height": 512}, "width", "width is 500", "nearest: 496"),
    (SD, {"width": 512, "height": 128}, "height", "height is 128", "nearest: 256"),
    (SD, {"width": 4096, "height": 512}, "width", "width is 4096", "nearest: 1024"),
    (SDXL, {"width": 2048, "height": 2048}, "width", "4194304 pixels", "at most 2359296"),
    (SD, {"width": 1024, "height": 256}, "width", "too long a side", "3 to 1"),
    (SD, {"num_inference_steps": 51}, "num_inference_steps", "is 51", "runs 1-50"),
    (DREAMSHAPER, {"num_inference_steps": 10}, "num_inference_steps", "is 10", "runs 15-30"),
    (DREAMSHAPER, {"num_inference_steps": 31}, "num_inference_steps", "is 31", "runs 15-30"),
    (SD, {"guidance_scale": 30.0}, "guidance_scale", "is 30", "takes 0-20"),
    (SD, {"scheduler": "magic"}, "scheduler", "'magic' is not one", "auto, euler, euler_karras"),
    (SD, {"max_sequence_length": 77}, "max_sequence_length", "has no max_sequence_length", "leave it out"),
    (DEV, {"max_sequence_length": 513}, "max_sequence_length", "is 513", "takes 512"),
    (SD, {"seed": MAX_SEED, "num_images": 2}, "seed", "seed must be", "at most"),
    (SD, {"edit": edit(strength=0.01)}, "strength", "leaves no step to run", "at least 0.034"),
    (SD, {"edit": Edit(image=b"GIF89a")}, "image", "not a readable picture", "PNG, JPEG or WebP"),
    (SD, {"edit": edit(mask_image=b"?")}, "mask_image", "not a readable picture", "PNG, JPEG or WebP"),
    (SD, {"edit": edit(8, 8)}, "image", "image is 8x8", "at least 16"),
    (SCHNELL, {"controls": [control()]}, "control_type", "no control picture of type canny", "takes none"),
    (CANNY_ONLY, {"controls": [control("pose")]}, "control_type", "of type pose", "it takes canny, depth"),
    (CANNY_ONLY, {"controls": [control("depth")]}, "control_image", "cannot find the depth", "is_map: true"),
    (SD, {"controls": [control(start=0.5, end=0.5)]}, "control_start", "ends at 0.5", "below end"),
    (SD, {"controls": [control(width=8, height=8)]}, "control_image", "8x8", "at least 16"),
    (
        SD,
        {"controls": [control(), Control(image=b"?", type="depth")]},
        "controls.1.image",
        "not a readable picture",
        "PNG, JPEG or WebP",
    ),
    (SD, {"refiner": True}, "refiner", "has no refiner", "leave refiner out"),
    (SDXL, {"refiner": 0.5, "edit": edit()}, "refiner", "text-to-image only", "sdxl-refiner-1.0"),
    (SDXL, {"refiner": True, "num_inference_steps": 1}, "num_inference_steps", "two models", "at least 2"),
    (REFINER, {"refine": True}, "image", "needs a picture", "send image"),
    (REFINER, {"refine": True, "edit": edit(mask_image=png(64, 64))}, "mask_image", "whole picture", "leave"),
    (REFINER, {"refine": True, "edit": edit(), "controls": [control()]}, "controls", "follows", "leave"),
    (NO_LORAS, {"loras": [lora(1)]}, "loras", "takes no LoRA", "leave it out"),
    (ONE_LORA, {"loras": [lora(1), lora(2)]}, "loras", "there are 2 LoRAs", "at most 1"),
    (SDXL, {"refine": True, "edit": edit()}, "refine", "cannot do refine", "it can do t2i"),
]


@pytest.mark.parametrize(
    ("card", "asked", "param", "cause", "remedy"),
    REFUSALS,
    ids=[f"{row[0].id}: {row[3]}" for row in REFUSALS],
)
def test_a_refusal_names_the_field_the_cause_and_the_remedy(
    card: ModelCard, asked: dict[str, Any], param: str, cause: str, remedy: str
) -> None:
    error = refusal(card, **asked)

    assert error.param == param
    assert cause in error.message
    assert remedy in error.message


def test_a_picture_of_too_many_pixels_is_too_large_and_not_decoded() -> None:
    error = refusal(SD, edit=edit(5000, 4000))

    assert isinstance(error, TooLarge)
    assert error.param == "image"
    assert "at most 16 megapixels" in error.message


def test_strength_zero_is_no_error_it_gives_the_picture_back() -> None:
    request = resolved(SD, edit=edit(strength=0.0))

    assert denoising_steps(request, SD) == 0


@many
@given(steps=st.integers(1, 50))
def test_the_strength_that_a_refusal_advises_is_accepted(steps: int) -> None:
    error = refusal(SD, num_inference_steps=steps, edit=edit(64, 64, strength=1e-6))
    advised = float(error.message.rsplit(" ", 1)[-1])

    request = resolved(SD, num_inference_steps=steps, edit=edit(64, 64, strength=advised))

    assert denoising_steps(request, SD) >= 1


# --- for every card and every request ---------------------------------------------------------------------

PICTURES = st.sampled_from([(64, 64), (100, 2000), (1000, 500), (3000, 40), (640, 480), (17, 1999)])


CONTROLS = [control(), control("depth", 640, 480), control("pose", weight=0.5, end=0.5)]


@st.composite
def requests_and_cards(draw: st.DrawFn) -> tuple[GenerationRequest, ModelCard]:
    """A request near the limits of a card, mostly inside them, and the card."""
    card = draw(st.sampled_from(IMAGE_CARDS))
    sizes, rarely = card.sizes, st.integers(0, 15).map(lambda n: n == 0)
    grid = st.integers(sizes.min // 16, sizes.max // 16).map(lambda n: 16 * n)
    side = draw(st.integers(1, 4096) if draw(rarely) else st.none() | st.just(sizes.min) | grid)
    strength = draw(st.none() | st.floats(0, 1))
    given_edit = PICTURES.map(lambda size: edit(*size, strength=strength))
    slack = 1 if draw(rarely) else 0
    request = request_for(
        prompt=draw(st.text("ab ", min_size=1, max_size=4)) + draw(st.sampled_from(["x", "x", "x", ""])),
        negative_prompt=draw(st.text(max_size=4)),
        width=side,
        height=draw(st.just(side) | grid),
        num_inference_steps=draw(st.none() | st.integers(card.steps.min, card.steps.max + slack)),
        guidance_scale=draw(st.none() | st.floats(card.guidance.min, card.guidance.max + slack)),
        seed=draw(st.none() | st.integers(0, MAX_SEED)),
        num_images=draw(st.integers(1, card.max_images + slack)),
        scheduler=draw(st.sampled_from([*card.schedulers, "unknown"] if slack else card.schedulers)),
        max_sequence_length=draw(st.sampled_from([None, card.max_sequence_length, 64 if slack else None])),
        edit=draw(given_edit if card is REFINER else st.none() | given_edit),
        controls=draw(st.lists(st.sampled_from(CONTROLS), max_size=2)) if draw(rarely) else [],
        refiner=draw(st.sampled_from([None, None, True, 0.5])) if draw(rarely) else None,
        refine=card is REFINER and draw(st.booleans()),
    )
    return request, card


def answer_to(request: GenerationRequest, card: ModelCard) -> Resolved | BadRequest | TooLarge:
    try:
        return resolve(request, card, fresh_seed=SEED)
    except (BadRequest, TooLarge) as error:
        return error


@many
@given(requests_and_cards())
def test_no_accepted_request_is_outside_its_card(pair: tuple[GenerationRequest, ModelCard]) -> None:
    answer, card = answer_to(*pair), pair[1]
    assume(isinstance(answer, Resolved))

    request, sizes = answer.request, card.sizes
    assert request.task in card.tasks
    assert card.steps.min <= request.num_inference_steps <= card.steps.max
    assert card.guidance.min <= request.guidance_scale <= card.guidance.max
    assert {request.width % sizes.multiple, request.height % sizes.multiple} == {0}
    assert sizes.min <= min(request.width, request.height)
    assert max(request.width, request.height) <= sizes.max
    assert request.width * request.height <= sizes.max_pixels
    assert max(request.width, request.height) <= sizes.max_aspect * min(request.width, request.height)
    assert request.scheduler in card.schedulers
    assert request.max_sequence_length == card.max_sequence_length
    assert card.negative_prompt or not request.negative_prompt
    assert request.num_images <= card.max_images
    assert request.seed + request.num_images - 1 <= MAX_SEED
    assert denoising_steps(request, card) >= 1 or (request.edit is not None and request.edit.strength == 0)


@many
@given(requests_and_cards())
def test_resolving_a_resolved_request_changes_nothing_and_adjusts_nothing(
    pair: tuple[GenerationRequest, ModelCard],
) -> None:
    answer, card = answer_to(*pair), pair[1]
    assume(isinstance(answer, Resolved))

    again = resolve(answer.request, card, fresh_seed=SEED + 1)

    assert again == Resolved(answer.request, ())


@settings(many, suppress_health_check=[HealthCheck.filter_too_much])
@given(requests_and_cards())
def test_every_refusal_names_a_field_of_the_request(pair: tuple[GenerationRequest, ModelCard]) -> None:
    answer = answer_to(*pair)
    assume(not isinstance(answer, Resolved))

    fields = {*GenerationRequest.model_fields, *Edit.model_fields, "control_type", "control_image"}
    assert answer.param in fields
    assert len(answer.message) > 20


def test_cost_counts_pictures_pixels_and_steps() -> None:
    request = resolved(SD, width=512, height=512, num_inference_steps=20, num_images=2)

    assert request.cost_mpx_steps == pytest.approx(2 * 0.262144 * 20)


# --- exactness --------------------------------------------------------------------------------------------


def serving(card: ModelCard, exact: str) -> ModelCard:
    return card.model_copy(update={"serving": card.serving.model_copy(update={"exact": exact})})


@pytest.mark.parametrize("exact", ["prefer", "strict", "off"])
def test_without_a_choice_the_card_decides_about_exactness(exact: str) -> None:
    assert resolved(serving(SD, exact)).exact == exact


@pytest.mark.parametrize("served", ["prefer", "strict"])
@pytest.mark.parametrize("requested", ["prefer", "strict", "off"])
def test_a_request_chooses_its_exactness_where_sizes_are_proven(served: str, requested: Any) -> None:
    assert resolved(serving(SD, served), exact=requested).exact == requested


def test_strict_is_refused_where_nothing_is_proven() -> None:
    refused = refusal(serving(SD, "off"), exact="strict")

    assert refused.param == "exact"
    assert "exact: off in its card" in refused.message
    assert "leave exact out" in refused.message


def test_a_preference_that_cannot_be_had_is_corrected_once() -> None:
    card = serving(SD, "off")

    request, warnings = resolve(request_for(exact="prefer"), card, fresh_seed=SEED)

    assert (request.exact, [warning.code for warning in warnings]) == ("off", ["exact_corrected"])
    assert resolve(request, card, fresh_seed=SEED) == Resolved(request, ())
