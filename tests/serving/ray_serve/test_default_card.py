"""Models without a card: FLUX runs with schnell's limits, every other model is refused."""

from __future__ import annotations

import pytest

from deployments.protocol.card import Weights, load_card
from deployments.protocol.errors import BadRequest
from serve_app.ray_serve.default_card import default_card
from serve_app.settings import ROOT


@pytest.mark.parametrize(
    ("model_id", "repo"),
    [
        ("my-flux", "me/mine"),
        ("mine", "someone/FLUX-tuned"),
        ("mine", "black-forest-labs/something-new"),
    ],
)
def test_a_flux_without_a_card_runs_as_schnell(model_id: str, repo: str) -> None:
    card = default_card(model_id, Weights(repo=repo))

    schnell = load_card(ROOT / "configs/models/flux.1-schnell.yaml")
    shared = {"family", "tasks", "steps", "guidance", "corrects", "negative_prompt", "schedulers"}
    assert card.model_dump(include=shared) == schnell.model_dump(include=shared)
    assert card.max_sequence_length == 256
    assert (card.id, card.weights.repo) == (model_id, repo)
    assert not card.licence.commercial


def test_any_other_model_without_a_card_is_refused_with_the_file_to_write() -> None:
    with pytest.raises(BadRequest, match=r"configs/models/mine\.yaml"):
        default_card("mine", Weights(repo="someone/sdxl-tuned"))
