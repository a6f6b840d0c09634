"""How the tests share a process."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests import service_settings


def test_no_two_test_files_have_the_same_name() -> None:
    """A process imports test files by their name alone, so a second one of that name is an error there."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))

    assert [name for name, count in names.items() if count > 1] == []


def test_settings_of_the_shared_service_are_hidden_from_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_settings, "_before", {})
    monkeypatch.setenv("WEFT_CARDS_DIR", "ours")
    monkeypatch.delenv("WEFT_DATA_DIR", raising=False)
    service_settings.apply({"WEFT_CARDS_DIR": "service", "WEFT_DATA_DIR": "service"})

    with service_settings.hidden():
        inside = os.environ.get("WEFT_CARDS_DIR"), os.environ.get("WEFT_DATA_DIR")
    after = os.environ.get("WEFT_CARDS_DIR"), os.environ.get("WEFT_DATA_DIR")
    service_settings.remove()

    assert inside == ("ours", None)
    assert after == ("service", "service")
    assert os.environ.get("WEFT_CARDS_DIR") == "ours"
    assert "WEFT_DATA_DIR" not in os.environ
