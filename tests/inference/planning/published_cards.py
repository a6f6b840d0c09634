"""The cards that ship, for tables of plans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deployments.protocol.card import ModelCard, load_cards

CARDS: Mapping[str, ModelCard] = load_cards(Path(__file__).parents[3] / "configs/models")


def card_of(name: str) -> ModelCard:
    """By its id."""
    return CARDS[name]
