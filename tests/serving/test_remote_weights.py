"""When an application brings weights to the nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.protocol.card import load_cards
from deployments.protocol.errors import BadRequest
from serve_app.app import _fetchers, build_weights
from serve_app.ray_serve.args import WeightsArgs

CARDS = Path(__file__).parents[2] / "configs/models"


def wanted(*names: str) -> list[str]:
    known = load_cards(CARDS)
    fetchers = _fetchers({name: known[name] for name in names}, known)
    return [card.id for fetcher in fetchers for card in fetcher._bound_deployment.init_args[0]]


def test_weights_of_the_hub_are_fetched_and_those_of_a_refiner_too() -> None:
    assert wanted("sdxl-base-1.0") == ["sdxl-base-1.0", "sdxl-refiner-1.0"]


def test_models_that_ship_need_nothing_fetched() -> None:
    assert wanted("tiny-flux-schnell", "tiny-wan") == []


def test_a_card_may_leave_it_out() -> None:
    known = load_cards(CARDS)
    card = known["flux.1-dev"]
    serving = card.serving.model_copy(update={"prefetch": False})

    assert _fetchers({card.id: card.model_copy(update={"serving": serving})}, known) == []


def test_a_fleet_has_an_application_of_its_own_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WEFT_DATA_DIR", str(tmp_path))

    application = build_weights(WeightsArgs(models=["flux.1-dev", "tiny-wan"]))

    assert application._bound_deployment.name == "WeightsFetcher"
    with pytest.raises(BadRequest, match="there is nothing to fetch"):
        build_weights(WeightsArgs(models=["tiny-wan"]))
