"""Which model a request names, what it allows, and what it may cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest, NotFound, WeftError
from deployments.protocol.request import GenerationRequest, Task
from serve_app.admission.validation import MAX_COST_MPX_STEPS, default_model, find_card, validate
from tests.serving.api.cards import CARDS, SCHNELL, SKETCH


def generation_request(**fields: object) -> GenerationRequest:
    return GenerationRequest.model_validate({"model": SKETCH.id, "prompt": "a red fox", **fields})


def test_a_model_is_found_by_its_id_by_an_alias_and_in_any_case():
    assert find_card(SCHNELL.id, CARDS) is SCHNELL
    assert find_card("someone/Sketch", CARDS) is SKETCH
    assert find_card("TINY-FLUX-SCHNELL", CARDS) is SCHNELL


def test_an_unknown_model_is_answered_with_the_known_ones_and_the_nearest():
    with pytest.raises(NotFound) as refusal:
        validate(generation_request(model="sketsh"), CARDS, fresh_seed=1)

    assert "sketch, tiny-flux-schnell" in refusal.value.message
    assert "Did you mean 'sketch'?" in refusal.value.message
    assert refusal.value.param == "model"


def test_a_name_like_nothing_here_is_given_no_guess():
    with pytest.raises(NotFound) as refusal:
        find_card("dall-e-3", CARDS)

    assert "Did you mean" not in refusal.value.message


def test_blanks_are_filled_from_the_card_and_the_fresh_seed():
    resolved = validate(generation_request(), CARDS, fresh_seed=11)

    assert (resolved.request.width, resolved.request.height) == (128, 128)
    assert resolved.request.num_inference_steps == 20
    assert resolved.request.seed == 11
    assert resolved.adjustments == ()


def test_schnell_is_corrected_to_four_steps_with_a_warning():
    resolved = validate(generation_request(model=SCHNELL.id, num_inference_steps=30), CARDS, fresh_seed=1)

    assert resolved.request.num_inference_steps == 4
    assert "Overriding 30 -> 4" in resolved.adjustments[0].message


def test_an_alias_is_accepted_under_the_models_own_id():
    assert (
        validate(generation_request(model="someone/sketch"), CARDS, fresh_seed=1).request.model == SKETCH.id
    )


def test_a_request_over_the_cost_limit_is_refused_with_its_cost():
    big = SKETCH.model_copy(
        update={
            "sizes": SKETCH.sizes.model_copy(update={"max": 2048, "max_pixels": 4_194_304}),
            "steps": SKETCH.steps.model_copy(update={"max": 500}),
        }
    )

    with pytest.raises(BadRequest, match="8389 megapixel-steps"):
        validate(
            generation_request(width=2048, height=2048, num_inference_steps=500, num_images=4),
            {big.id: big},
            fresh_seed=1,
        )


def test_the_default_model_is_the_first_ready_one_that_can_do_the_task():
    assert default_model(Task.t2i, CARDS, ready=()) == SCHNELL.id
    assert default_model(Task.t2i, CARDS, ready=("sketch",)) == "sketch"
    assert default_model(Task.inpaint, CARDS, ready=("sketch",)) == SCHNELL.id


def test_the_default_model_takes_the_control_pictures_and_has_the_refiner_asked_for():
    ready = (SCHNELL.id, SKETCH.id)

    assert default_model(Task.t2i, CARDS, ready, controls={"canny"}) == SKETCH.id
    assert default_model(Task.t2i, CARDS, ready, refiner=True) == SKETCH.id
    with pytest.raises(BadRequest, match="t2i with control pictures of type canny, pose"):
        default_model(Task.t2i, CARDS, ready, controls={"pose", "canny"})


def test_a_task_that_no_model_can_do_is_refused_with_the_reason():
    with pytest.raises(BadRequest, match="no model here can do inpaint"):
        default_model(Task.inpaint, {"sketch": SKETCH}, ready=())


@given(
    st.builds(
        GenerationRequest,
        model=st.sampled_from([SKETCH.id, SCHNELL.id]),
        prompt=st.text(max_size=20),
        width=st.none() | st.integers(1, 4096),
        height=st.none() | st.integers(1, 4096),
        num_inference_steps=st.none() | st.integers(1, 1000),
        guidance_scale=st.none() | st.floats(0, 100),
        num_images=st.integers(1, 16),
    )
)
def test_every_accepted_request_is_within_its_card_and_the_cost_limit(request: GenerationRequest):
    card: ModelCard = CARDS[request.model]

    try:
        resolved = validate(request, CARDS, fresh_seed=5).request
    except WeftError:
        return

    assert card.steps.min <= resolved.num_inference_steps <= card.steps.max
    assert card.guidance.min <= resolved.guidance_scale <= card.guidance.max
    assert resolved.width * resolved.height <= card.sizes.max_pixels
    assert resolved.cost_mpx_steps <= MAX_COST_MPX_STEPS
