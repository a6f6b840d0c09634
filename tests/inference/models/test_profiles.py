"""What was measured of a model on a device is kept beside its weights and read for that device only."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from deployments.planning.local_files import MODEL_CACHE
from deployments.planning.machine import Machine
from deployments.planning.plan import PartPlan, everything_on_device
from deployments.planning.profile import (
    FOLDER,
    Profile,
    profile_key,
    read_profile,
    write_profile,
)
from deployments.protocol.card import ModelCard, Weights, load_card

PROFILE = Profile(64, 64, 2, {2: 0.1, 4: 0.15, 8: 0.4}, 0.01, 0.02)
A10G = Machine("NVIDIA A10G", "cuda", 22 * 2**30, (8, 6))
PLAN = everything_on_device("bfloat16")
SD15 = load_card(Path(__file__).parents[3] / "configs/models/tiny-sd15.yaml")


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelCard:
    """Of weights in a folder of their own."""
    monkeypatch.setenv(MODEL_CACHE, str(tmp_path / "cache"))
    folder = tmp_path / "weights"
    folder.mkdir()
    return SD15.model_copy(update={"weights": Weights(path=str(folder))})


def test_a_profile_is_kept_beside_the_weights_and_read_again(card: ModelCard, tmp_path: Path) -> None:
    key = profile_key(card, PLAN, A10G)

    file = write_profile(card.weights, key, PROFILE)

    assert file.parent == tmp_path / "weights" / FOLDER
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert read_profile(card.weights, key) == PROFILE
    assert PROFILE.best_rows == 4


def test_a_profile_of_another_device_form_or_card_is_not_read(card: ModelCard) -> None:
    write_profile(card.weights, profile_key(card, PLAN, A10G), PROFILE)
    int8 = dataclasses.replace(PLAN, parts=(PartPlan("unet", "bfloat16", quantisation="int8"),))
    compiled = card.model_copy(update={"serving": card.serving.model_copy(update={"compile": True})})
    others = [
        profile_key(card, PLAN, dataclasses.replace(A10G, name="NVIDIA L4")),
        profile_key(card, int8, A10G),
        profile_key(compiled, PLAN, A10G),
        profile_key(card, PLAN, A10G) | {"versions": "weft 0.0.0"},
    ]

    assert [read_profile(card.weights, key) for key in others] == [None] * 4
    less_memory = dataclasses.replace(A10G, limit_bytes=2**30)
    assert read_profile(card.weights, profile_key(card, PLAN, less_memory)) == PROFILE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"key": {}}',
        '{"key": KEY, "profile": {}}',
        '{"key": KEY, "profile": {"step_s": 3}}',
    ],
)
def test_a_damaged_profile_is_ignored_with_a_warning(
    card: ModelCard, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = profile_key(card, PLAN, A10G)
    file = write_profile(card.weights, key, PROFILE)
    whole = file.read_text()
    start, end = whole.index('"key":') + 6, whole.index('"profile"')
    file.write_text(text.replace("KEY", whole[start:end].rstrip().rstrip(",")))

    with caplog.at_level(logging.WARNING):
        found = read_profile(card.weights, key)

    assert found is None
    assert ("cannot be read" in caplog.text) == (text != '{"key": {}}')  # that one is of another device


@pytest.mark.parametrize("seconds", ["-1", "0", "1e999", "NaN"])
def test_seconds_that_are_none_are_damage(card: ModelCard, seconds: str) -> None:
    key = profile_key(card, PLAN, A10G)
    file = write_profile(card.weights, key, PROFILE)
    file.write_text(file.read_text().replace("0.15", seconds))

    assert read_profile(card.weights, key) is None


def test_a_folder_that_cannot_be_written_leaves_the_profile_in_the_model_cache(
    card: ModelCard, tmp_path: Path
) -> None:
    (tmp_path / "weights" / FOLDER).write_text("in the way")
    key = profile_key(card, PLAN, A10G)

    file = write_profile(card.weights, key, PROFILE)

    assert file.parent == tmp_path / "cache" / FOLDER
    assert read_profile(card.weights, key) == PROFILE


def test_weights_of_the_hub_have_theirs_in_the_model_cache_each_its_own(
    card: ModelCard, tmp_path: Path
) -> None:
    first, second = (card.model_copy(update={"weights": Weights(repo=f"someone/{name}")}) for name in "ab")
    file = write_profile(first.weights, profile_key(first, PLAN, A10G), PROFILE)

    assert file.parent == tmp_path / "cache" / FOLDER
    assert read_profile(first.weights, profile_key(first, PLAN, A10G)) == PROFILE
    assert read_profile(second.weights, profile_key(second, PLAN, A10G)) is None
