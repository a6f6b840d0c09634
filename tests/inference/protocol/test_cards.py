"""The cards in configs/models: they load, their statements hold, and a mistake in one is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.pipelines.noise_schedulers import SCHEDULERS
from deployments.protocol.card import ModelCard, load_card, load_cards
from deployments.protocol.errors import BadRequest
from deployments.protocol.request import Task

FOLDER = Path(__file__).parents[3] / "configs/models"
CARDS = load_cards(FOLDER)
NAMED_IN_THE_REQUIREMENTS = {
    "flux.1-schnell",
    "flux.1-dev",
    "stable-diffusion-v1.5",
    "dreamshaper-8",
    "realistic-vision-v6",
    "sdxl-base-1.0",
    "sdxl-refiner-1.0",
    "hunyuan-video",
}
every_card = pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)


@pytest.fixture
def facts() -> dict[str, Any]:
    """A card that is right, as its YAML reads."""
    return yaml.safe_load((FOLDER / "stable-diffusion-v1.5.yaml").read_text(encoding="utf-8"))


def written(folder: Path, facts: dict[str, Any], name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(facts), encoding="utf-8")
    return path


# --- the shipped ones -------------------------------------------------------------------------------------


def test_every_shipped_card_loads_and_is_called_as_its_file() -> None:
    assert list(CARDS) == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert set(CARDS) >= NAMED_IN_THE_REQUIREMENTS


def test_no_name_means_two_models() -> None:
    names = [name.casefold() for card in CARDS.values() for name in (card.id, *card.aliases)]

    assert len(names) == len(set(names))


@every_card
def test_a_model_from_the_hub_answers_to_its_hub_id(card: ModelCard) -> None:
    weights = card.weights
    names = {file.name for file in weights.gguf.values()} or {weights.repo}

    assert weights.repo is None or names.intersection(card.aliases)


@every_card
def test_a_card_lists_only_schedulers_that_exist(card: ModelCard) -> None:
    assert card.schedulers[0] == "auto"
    assert set(card.schedulers) <= {"auto", *SCHEDULERS}


@every_card
def test_a_card_keeps_the_services_hard_limits(card: ModelCard) -> None:
    assert card.steps.max <= 50
    assert card.guidance.max <= 20
    assert card.sizes.max <= 2048
    assert card.sizes.max_pixels <= 4_194_304
    assert card.max_images <= 4


@every_card
def test_the_default_size_is_allowed(card: ModelCard) -> None:
    sides = sorted((card.sizes.width, card.sizes.height))

    assert card.sizes.min <= sides[0]
    assert sides[1] <= card.sizes.max
    assert sides[1] <= card.sizes.max_aspect * sides[0]


@every_card
def test_a_card_names_the_licence_of_its_pictures(card: ModelCard) -> None:
    assert card.licence.name
    assert card.licence.url.startswith("https://")


def test_a_gpu_model_starts_from_zero_replicas_and_states_the_memory_it_needs() -> None:
    on_gpu = [card for card in CARDS.values() if card.serving.num_gpus]

    assert {card.id for card in on_gpu} >= NAMED_IN_THE_REQUIREMENTS
    assert {card.id for card in on_gpu} == {card.id for card in CARDS.values() if card.weights.repo}
    assert {card.serving.min_replicas for card in on_gpu} == {0}
    assert all(card.vram_gib > 0 for card in on_gpu)


# of one picture or video at the card's size, on the smallest GPU that holds the weights, by FLOPs alone
SECONDS_PER_STEP = {
    "flux.1-schnell": 0.3,  # L40S
    "flux.1-dev": 0.3,
    "flux.1-dev-q4": 1.7,  # RTX 3060
    "flux.1-dev-q8": 0.9,  # A10G
    "stable-diffusion-v1.5": 0.03,  # T4, L4
    "dreamshaper-8": 0.03,
    "realistic-vision-v6": 0.03,
    "sdxl-base-1.0": 0.2,  # A10G
    "sdxl-refiner-1.0": 0.2,
    "hunyuan-video": 72.0,  # A100
}


@pytest.mark.parametrize("card_id", SECONDS_PER_STEP)
def test_a_request_with_the_cards_defaults_ends_in_time_in_a_full_replica(card_id: str) -> None:
    card = CARDS[card_id]

    seconds = SECONDS_PER_STEP[card_id] * card.steps.default * card.serving.slots

    assert 1.5 * seconds <= card.serving.job_timeout_s


def test_schnell_is_fixed_and_corrects_and_dev_is_neither() -> None:
    schnell, dev = CARDS["flux.1-schnell"], CARDS["flux.1-dev"]

    assert (schnell.steps.min, schnell.steps.default, schnell.steps.max) == (4, 4, 4)
    assert (schnell.guidance.default, schnell.max_sequence_length) == (0.0, 256)
    assert (schnell.corrects, schnell.schedulers) == (True, ["auto"])
    assert (dev.steps.default, dev.guidance.default, dev.corrects) == (30, 3.5, False)
    assert (dev.licence.gated, dev.licence.commercial) == (True, False)


def test_dreamshaper_runs_15_to_30_steps() -> None:
    steps = CARDS["dreamshaper-8"].steps

    assert (steps.min, steps.max) == (15, 30)


def test_the_refiner_of_sdxl_has_a_card_and_takes_pictures_only() -> None:
    refiner = CARDS[CARDS["sdxl-base-1.0"].refiner or ""]

    assert refiner.id == "sdxl-refiner-1.0"
    assert refiner.tasks == [Task.i2i, Task.refine]
    assert CARDS["sdxl-base-1.0"].refiner_start == 0.8


def test_a_refiner_that_a_card_names_has_a_card() -> None:
    named = [card.refiner for card in CARDS.values() if card.refiner]

    assert set(named) <= set(CARDS)
    assert all(Task.refine in CARDS[name].tasks for name in named)


@every_card
def test_a_controlnet_names_its_licence(card: ModelCard) -> None:
    for entry in card.controls.values():
        assert entry.licence.name
        assert entry.licence.url.startswith("https://")
        assert entry.licence.commercial or not card.licence.commercial


@pytest.mark.parametrize("card_id", ["stable-diffusion-v1.5", "sdxl-base-1.0", "flux.1-dev"])
def test_every_kind_of_control_picture_may_be_a_plain_one(card_id: str) -> None:
    controls = CARDS[card_id].controls

    assert set(controls) == {"canny", "depth", "pose"}
    assert controls["depth"].preprocessor is not None
    assert controls["pose"].preprocessor is not None
    assert controls["pose"].detector is not None


@every_card
def test_a_cards_schedulers_suit_what_its_family_predicts(card: ModelCard) -> None:
    flows = {name.startswith("flow_") for name in card.schedulers if name != "auto"}

    assert flows <= {card.family in ("flux", "hunyuan_video", "wan", "ltx", "sd3")}


# --- mistakes ---------------------------------------------------------------------------------------------


def test_an_unknown_key_is_an_error_with_file_and_key(tmp_path: Path, facts: dict[str, Any]) -> None:
    path = written(tmp_path, facts | {"step": 4})

    with pytest.raises(BadRequest) as caught:
        load_card(path)

    assert str(path) in caught.value.message
    assert "the key step is unknown; did you mean steps?" in caught.value.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": {"min": 5, "default": 4, "max": 9}}, "min <= default <= max"),
        ({"guidance": {"min": 0.0, "default": 9.0, "max": 5.0}}, "min <= default <= max"),
        ({"sizes": {"width": 500, "height": 512}}, "500 is not a multiple of 16"),
        ({"sizes": {"width": 2048, "height": 2048, "max_pixels": 65536}}, "over max_pixels"),
        ({"weights": {}}, "exactly one of path and repo"),
        ({"weights": {"path": "a", "repo": "b/c"}}, "exactly one of path and repo"),
        ({"tasks": ["t2i", "dance"]}, "unknown task 'dance'"),
        ({"id": "Not An Id"}, "id"),
        ({"family": "Not a word!"}, "family"),
        ({"controls": {"scribble": {}}}, "scribble"),
        ({"controls": {"canny": {"weights": {"repo": "a/b"}}}}, "controls.canny.licence"),
        (
            {
                "controls": {
                    "pose": {
                        "weights": {"repo": "a/b"},
                        "preprocessor": {"repo": "c/d"},
                        "licence": {"name": "MIT", "url": "https://example.org"},
                    }
                }
            },
            "both preprocessor and detector",
        ),
        ({"refiner_start": 1.0}, "refiner_start"),
    ],
    ids=str,
)
def test_an_invalid_value_is_named(
    tmp_path: Path, facts: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    path = written(tmp_path, facts | change)

    with pytest.raises(BadRequest, match=words):
        load_card(path)


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("id: [", encoding="utf-8")

    with pytest.raises(BadRequest, match=r"mine\.yaml, line 1 is not valid YAML"):
        load_card(path)


def test_two_cards_with_one_id_are_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    written(tmp_path, facts, "a.yaml")
    written(tmp_path, facts, "b.yaml")

    with pytest.raises(BadRequest, match="ids are unique"):
        load_cards(tmp_path)


def test_a_card_that_asks_for_several_gpus_is_refused_with_the_cure(
    tmp_path: Path, facts: dict[str, Any]
) -> None:
    path = written(tmp_path, facts | {"serving": {"num_gpus": 2}})

    with pytest.raises(BadRequest, match=r"num_gpus: 2 would leave all but one.*max_replicas"):
        load_card(path)


# --- keys that had another name ---------------------------------------------------------------------------


@pytest.mark.parametrize(("deterministic", "exact"), [(True, "strict"), (False, "off")])
def test_the_switch_before_exact_is_read_and_logged(
    deterministic: bool, exact: str, facts: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts["serving"] = {**facts.get("serving", {}), "deterministic": deterministic}

    card = load_card(written(tmp_path, facts))

    assert card.serving.exact == exact
    assert f"that is now `exact: {exact}`" in caplog.text


@pytest.mark.parametrize(
    ("serving", "reason"),
    [
        ({"deterministic": True, "exact": "prefer"}, "deterministic is the old name of exact"),
        ({"deterministic": "yes"}, "write exact: prefer, strict or off"),
        ({"exact": "always"}, "'prefer', 'strict' or 'off'"),
    ],
    ids=["both", "no switch", "unknown"],
)
def test_a_wrong_exactness_stops_the_start_with_the_reason(
    serving: dict[str, Any], reason: str, facts: dict[str, Any], tmp_path: Path
) -> None:
    facts["serving"] = {**facts.get("serving", {}), **serving}

    with pytest.raises(BadRequest, match=reason):
        load_card(written(tmp_path, facts))


def test_a_card_prefers_exactness_unless_it_says_otherwise(facts: dict[str, Any], tmp_path: Path) -> None:
    assert load_card(written(tmp_path, facts)).serving.exact == "prefer"
