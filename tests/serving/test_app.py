"""The composition root: what a Serve config file may contain, and what is refused with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from deployments.protocol.card import load_cards
from deployments.protocol.errors import BadRequest, NotFound
from serve_app.app import NO_GPU, _models, build
from serve_app.ray_serve.args import AppArgs

CARDS = Path(__file__).parents[2] / "configs/models"


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


def test_models_that_make_videos_share_one_encoder() -> None:
    cards = load_cards(CARDS)

    models = _models({name: cards[name] for name in ("hunyuan-video", "tiny-wan", "tiny-flux-schnell")}, {})

    encoders = {name: model._bound_deployment.init_kwargs.get("encoder") for name, model in models.items()}
    encoder = encoders["hunyuan-video"]
    assert encoder is not None
    assert encoders == {"hunyuan-video": encoder, "tiny-wan": encoder, "tiny-flux-schnell": None}
    assert encoder._bound_deployment.ray_actor_options["runtime_env"] == NO_GPU


@pytest.mark.parametrize(("lora_min", "expected"), [(None, 1), (0, 0), (2, 2)])
def test_replicas_for_loras_have_a_least_number_of_their_own(lora_min: int | None, expected: int) -> None:
    card = load_cards(CARDS)["tiny-flux-schnell"]
    serving = {"lora": "dedicated", "min_replicas": 1, "max_replicas": 3, "lora_min_replicas": lora_min}
    card = card.model_copy(update={"serving": card.serving.model_copy(update=serving)})

    model = _models({card.id: card}, {})[card.id]._bound_deployment
    pool = model.init_kwargs["lora_pool"]._bound_deployment

    minimum = [each._deployment_config.autoscaling_config.min_replicas for each in (model, pool)]
    assert (pool.name, minimum) == ("lora-tiny-flux-schnell", [1, expected])


def test_a_model_may_be_served_without_its_refiner_being_a_model_of_its_own() -> None:
    assert build(AppArgs(models=["sdxl-base-1.0"])) is not None


def test_a_refiner_without_a_card_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    card = (CARDS / "sdxl-base-1.0.yaml").read_text(encoding="utf-8")
    (tmp_path / "sdxl-base-1.0.yaml").write_text(card, encoding="utf-8")

    with pytest.raises(
        NotFound, match=r"sdxl-base-1\.0 names the refiner 'sdxl-refiner-1\.0', which has no card"
    ):
        build(AppArgs(models=["sdxl-base-1.0"], settings={"cards_dir": str(tmp_path)}))


def test_flux_weights_without_card_are_served_as_schnell_and_others_are_refused() -> None:
    weights = {"path": "somewhere"}

    assert build(AppArgs.model_validate({"models": [{"id": "my-flux", "weights": weights}]})) is not None
    with pytest.raises(BadRequest, match=r"has no card; write configs/models/my-model\.yaml"):
        build(AppArgs.model_validate({"models": [{"id": "my-model", "weights": weights}]}))


def test_settings_may_stand_in_the_config_file() -> None:
    with pytest.raises(BadRequest, match="max_pending"):
        build(AppArgs(models=["tiny-flux-schnell"], settings={"max_pending": 0}))


def test_cards_of_one_group_share_a_deployment(tmp_path: Path) -> None:
    card = (CARDS / "tiny-flux-schnell.yaml").read_text(encoding="utf-8")
    for name in ("one", "two"):
        text = card.replace("id: tiny-flux-schnell", f"id: {name}")
        text = text.replace("serving: {", "serving: {group: both, ")
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")

    models = _models(load_cards(tmp_path), {})

    assert models["one"] is models["two"]


def test_a_group_may_not_be_called_as_a_card_that_is_not_in_it(tmp_path: Path) -> None:
    card = (CARDS / "tiny-flux-schnell.yaml").read_text(encoding="utf-8")
    grouped = card.replace("id: tiny-flux-schnell", "id: one").replace(
        "serving: {", "serving: {group: other, "
    )
    (tmp_path / "one.yaml").write_text(grouped, encoding="utf-8")
    (tmp_path / "other.yaml").write_text(card.replace("id: tiny-flux-schnell", "id: other"), encoding="utf-8")

    with pytest.raises(BadRequest, match="another name"):
        _models(load_cards(tmp_path), {})
