"""Chapter 1: what a caller asks is a GenerationRequest; what a model allows is its card."""

from __future__ import annotations

import pytest

from deployments.protocol.card import ModelCard
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import GenerationRequest
from deployments.validation.resolve import resolve


def test_the_card_fills_the_blanks(card: ModelCard) -> None:
    asked = GenerationRequest(model="tiny-flux-schnell", prompt="a red circle")

    request, adjustments = resolve(asked, card, fresh_seed=7)

    assert (request.width, request.height) == (128, 128)
    assert (request.num_inference_steps, request.guidance_scale, request.seed) == (4, 0.0, 7)
    assert adjustments == ()


def test_schnell_is_corrected_to_four_steps_and_the_caller_is_told(card: ModelCard) -> None:
    asked = GenerationRequest(model="tiny-flux-schnell", prompt="a red circle", num_inference_steps=30)

    request, adjustments = resolve(asked, card, fresh_seed=7)

    assert request.num_inference_steps == 4
    assert adjustments[0].message == "FLUX requires exactly 4 steps. Overriding 30 -> 4"


def test_what_cannot_be_is_refused_with_cause_and_cure(card: ModelCard) -> None:
    asked = GenerationRequest(model="tiny-flux-schnell", prompt="a red circle", width=100)

    with pytest.raises(
        BadRequest, match=r"width is 100; it must be 64-256 and a multiple of 16 \(nearest: 96\)"
    ):
        resolve(asked, card, fresh_seed=7)
