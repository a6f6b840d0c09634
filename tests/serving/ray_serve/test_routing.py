"""Which cards a gateway serves, as applications of models come, change and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.protocol.card import ModelCard, load_cards
from deployments.protocol.errors import BadRequest
from serve_app.ray_serve.routing import (
    MODEL_BUILDER,
    FleetRoutes,
    ReplicaPool,
    RunningApplication,
    ServedCards,
    routes_of,
)

CARDS = Path(__file__).parents[3] / "configs/models"


@pytest.fixture(autouse=True)
def no_settings_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEFT_DATA_DIR", str(tmp_path))


def application(
    *models: str | dict[str, Any], at: float = 1.0, status: str = "RUNNING", **args: Any
) -> RunningApplication:
    names = [model if isinstance(model, str) else model["id"] for model in models]
    deployments = dict.fromkeys(names, ReplicaPool("HEALTHY", 1))
    return RunningApplication(MODEL_BUILDER, {"models": list(models), **args}, status, at, deployments)


def card(card_id: str, **serving: Any) -> dict[str, Any]:
    written = yaml.safe_load((CARDS / "tiny-flux-schnell.yaml").read_text(encoding="utf-8"))
    return written | {"id": card_id, "serving": written["serving"] | serving}


def parsed(*cards: dict[str, Any]) -> dict[str, ModelCard]:
    return {each["id"]: ModelCard.model_validate(each) for each in cards}


def test_a_gateway_serves_the_applications_that_name_it_and_no_other() -> None:
    fleet = FleetRoutes("weft")

    fleet.update(
        {
            "b": application("tiny-sd15"),
            "a": application("tiny-flux-schnell"),
            "elsewhere": application("tiny-wan", gateway="another"),
            "not ours": RunningApplication("shop.app:build", {"models": ["tiny-sdxl-base"]}, "RUNNING", 1.0),
        }
    )

    assert list(fleet.routes) == ["tiny-flux-schnell", "tiny-sd15"]
    assert fleet.routes["tiny-flux-schnell"].application == "a"
    assert fleet.routes["tiny-flux-schnell"].loras == "lora-tiny-flux-schnell"
    assert fleet.routes["tiny-sd15"].loras == fleet.routes["tiny-sd15"].deployment == "tiny-sd15"


def test_a_mapping_of_cards_follows_models_that_come_and_go() -> None:
    fleet = FleetRoutes("weft")
    cards = ServedCards(fleet)

    fleet.update({"a": application("tiny-flux-schnell"), "b": application("tiny-sd15")})
    both = dict(cards)
    fleet.update({"b": application("tiny-sd15")})

    assert list(both) == ["tiny-flux-schnell", "tiny-sd15"]
    assert dict(cards) == {"tiny-sd15": load_cards(CARDS)["tiny-sd15"]}


def test_a_whole_card_may_stand_in_the_args_and_is_read_anew_with_each_deployment() -> None:
    fleet = FleetRoutes("weft")

    fleet.update({"a": application(card("new", slots=3))})
    before = fleet.routes["new"].card.serving.slots
    fleet.update({"a": application(card("new", slots=5), at=2.0)})

    assert (before, fleet.routes["new"].card.serving.slots) == (3, 5)


def test_an_application_that_is_being_changed_serves_what_it_does_before_and_after() -> None:
    fleet = FleetRoutes("weft")
    fleet.update({"a": application("tiny-sd15", "tiny-sdxl-base")})

    fleet.update({"a": application("tiny-sdxl-base", "tiny-flux-dev", at=2.0, status="DEPLOYING")})
    meanwhile = list(fleet.routes)
    fleet.update({"a": application("tiny-sdxl-base", "tiny-flux-dev", at=2.0)})

    assert meanwhile == ["tiny-sdxl-base"]
    assert list(fleet.routes) == ["tiny-sdxl-base", "tiny-flux-dev"]


def test_a_new_application_is_served_as_soon_as_its_deployments_exist() -> None:
    fleet = FleetRoutes("weft")

    fleet.update({"a": RunningApplication(MODEL_BUILDER, {"models": ["tiny-sd15"]}, "DEPLOYING", 1.0)})
    before = list(fleet.routes)
    fleet.update({"a": application("tiny-sd15", status="DEPLOYING")})

    assert before == []
    assert list(fleet.routes) == ["tiny-sd15"]


@pytest.mark.parametrize("args", [{"models": ["no-such-card"]}, {"modells": ["tiny-sd15"]}, {"models": []}])
def test_args_that_serve_refuses_leave_what_ran(
    args: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    fleet = FleetRoutes("weft")
    fleet.update({"a": application("tiny-sd15"), "b": application("tiny-sdxl-base")})

    for _ in range(3):
        fleet.update(
            {
                "a": RunningApplication(
                    MODEL_BUILDER, args, "DEPLOY_FAILED", 2.0, {"tiny-sd15": ReplicaPool("HEALTHY", 1)}
                ),
                "b": application("tiny-sdxl-base"),
            }
        )

    assert list(fleet.routes) == ["tiny-sd15", "tiny-sdxl-base"]
    assert [record.getMessage()[:42] for record in caplog.records] == [
        "the args of the application a are not vali"
    ]


def test_of_two_applications_with_the_same_card_the_first_by_name_serves_it() -> None:
    fleet = FleetRoutes("weft")

    fleet.update({"b": application("tiny-sd15"), "a": application("tiny-sd15")})

    assert fleet.routes["tiny-sd15"].application == "a"


def test_video_models_take_loras_like_all_other_requests() -> None:
    routes = routes_of(load_cards(CARDS), "weft")

    assert (routes["tiny-wan"].loras, routes["tiny-wan"].routed_by_lora) == ("tiny-wan", False)
    assert (routes["tiny-sdxl-base"].loras, routes["tiny-sdxl-base"].routed_by_lora) == (
        "tiny-sdxl-base",
        True,
    )
    assert routes_of(parsed(card("plain", lora="none")), "weft")["plain"].loras is None


def test_a_card_may_not_have_the_name_of_the_lora_deployment_of_another() -> None:
    with pytest.raises(BadRequest, match="'lora-one' is the deployment for the LoRAs of 'one'"):
        routes_of(parsed(card("one"), card("lora-one")), "weft")
