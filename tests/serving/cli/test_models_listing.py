"""`weft models` lists the cards by kind."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.protocol.card import ModelCard, load_cards
from serve_app.cli.main import main
from serve_app.cli.models import EDIT, GATED, IMAGE, LOCAL, VIDEO, group_of, listing
from serve_app.settings import ROOT

CARDS = load_cards(ROOT / "configs/models")


def changed(name: str, **changes: Any) -> ModelCard:
    return CARDS[name].model_copy(update=changes)


def test_each_card_is_under_its_kind() -> None:
    found = {name: group_of(card) for name, card in CARDS.items()}

    assert found["tiny-flux-schnell"] == found["tiny-wan"] == LOCAL
    assert found["sdxl-base-1.0"] == IMAGE
    assert found["hunyuan-video"] == VIDEO
    assert found["flux.1-dev"] == GATED
    assert group_of(changed("sdxl-base-1.0", tasks=["edit"])) == EDIT


def test_the_listing_has_a_header_and_every_card_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0

    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["id", "tasks", "exact", "memory", "licence", "weights"]
    rows = [line.split()[0] for line in lines if line and not line.endswith(":")]
    assert sorted(rows) == sorted(CARDS)
    titles = [line for line in lines if line.endswith(":")]
    assert titles == [f"{group}:" for group in (LOCAL, IMAGE, EDIT, VIDEO, GATED)]


def test_a_row_has_the_memory_the_limits_of_the_licence_and_a_missing_folder() -> None:
    weights = CARDS["tiny-wan"].weights.model_copy(update={"path": "models/nowhere"})
    rows = list(listing([changed("tiny-wan", weights=weights), CARDS["flux.1-dev"]]))

    assert rows[2].endswith("models/nowhere (missing)")
    assert " CPU " in rows[2]
    assert "33 GiB" in rows[4]
    assert "(not commercial)" in rows[4]
