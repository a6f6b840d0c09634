"""Chapter 1: a caller sends a GenerationRequest; the model's card turns it into a resolved request."""

from __future__ import annotations

import pytest

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import GenerationRequest
from deployments.validation.resolve import resolve


def test_the_card_fills_the_blanks(card: ModelCard) -> None:
    request = GenerationRequest(model="tiny-flux-schnell", prompt="a red circle")

    resolved, adjustments = resolve(request, card, fresh_seed=7)

    assert (resolved.width, resolved.height) == (128, 128)
    assert (resolved.num_inference_steps, resolved.guidance_scale, resolved.seed) == (4, 0.0, 7)
    assert adjustments == ()


def test_schnell_is_corrected_to_four_steps_with_a_warning(card: ModelCard) -> None:
    request = GenerationRequest(model="tiny-flux-schnell", prompt="a red circle", num_inference_steps=30)

    resolved, adjustments = resolve(request, card, fresh_seed=7)

    assert resolved.num_inference_steps == 4
    assert adjustments[0].message == "FLUX requires exactly 4 steps. Overriding 30 -> 4"


def test_a_value_outside_the_card_is_refused_with_cause_and_remedy(card: ModelCard) -> None:
    request = GenerationRequest(model="tiny-flux-schnell", prompt="a red circle", width=100)

    with pytest.raises(
        BadRequest, match=r"width is 100; it must be 64-256 and a multiple of 16 \(nearest: 96\)"
    ):
        resolve(request, card, fresh_seed=7)
