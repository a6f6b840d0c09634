"""The roof: what may be put into serve_config.yaml, and what is refused with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from deployments.protocol.errors import BadRequest, NotFound
from serve_app.app import AppArgs, build


@pytest.fixture(autouse=True)
def no_settings_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEFT_DATA_DIR", str(tmp_path))


def test_the_graph_is_built_without_a_cluster() -> None:
    application = build(AppArgs(models=["tiny-flux-schnell", "flux.1-dev"]))

    assert application is not None


def test_a_misspelt_key_is_named() -> None:
    with pytest.raises(ValidationError, match="modells"):
        AppArgs.model_validate({"modells": ["tiny-flux-schnell"]})


def test_a_model_without_card_is_refused_naming_those_there_are() -> None:
    with pytest.raises(NotFound, match=r"no card 'tiny-fluks'.*tiny-flux-schnell"):
        build(AppArgs(models=["tiny-fluks"]))


def test_a_model_whose_tasks_nothing_here_can_run_is_refused() -> None:
    with pytest.raises(BadRequest, match="hunyuan-video does only t2v"):
        build(AppArgs(models=["hunyuan-video"]))


def test_flux_weights_without_card_are_served_as_schnell_and_others_are_refused() -> None:
    weights = {"path": "somewhere"}

    assert build(AppArgs.model_validate({"models": [{"id": "my-flux", "weights": weights}]})) is not None
    with pytest.raises(BadRequest, match=r"has no card; write configs/models/my-model\.yaml"):
        build(AppArgs.model_validate({"models": [{"id": "my-model", "weights": weights}]}))


def test_settings_may_stand_in_the_config_file() -> None:
    with pytest.raises(BadRequest, match="max_pending"):
        build(AppArgs(models=["tiny-flux-schnell"], settings={"max_pending": 0}))
