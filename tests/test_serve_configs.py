"""The Serve config files that ship: held against Serve's schema, our arguments and the graphs they make."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from ray.serve import Application
from ray.serve._private.build_app import build_app
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema
from ray.util.accelerators import accelerators

from deployments.protocol.errors import BadRequest, NotFound
from serve_app import app
from serve_app.cli import serve_config
from serve_app.ray_serve.args import ModelArgs
from serve_app.ray_serve.routing import MODEL_BUILDER

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "serve_config.yaml", *sorted((ROOT / "configs/serve").glob("*.yaml"))]
ACCELERATORS = {value for value in vars(accelerators).values() if isinstance(value, str)}


@pytest.fixture(autouse=True)
def no_settings_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEFT_DATA_DIR", str(tmp_path))


def config(file: Path) -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))


def built(application: ServeApplicationSchema) -> Application:
    """What Serve would run: the builder with its arguments validated."""
    module, _, name = application.import_path.partition(":")
    builder = getattr(import_module(module), name)
    (parameter,) = inspect.signature(builder).parameters.values()
    assert issubclass(parameter.annotation, BaseModel), "else Serve validates nothing"
    made: Application = builder(parameter.annotation.model_validate(application.args))
    return made


def deployments(application: ServeApplicationSchema) -> dict[str, Any]:
    """Deployments of the application by name."""
    name = application.name
    graph = build_app(built(application), name=name, default_runtime_env={})
    return {deployment.name: deployment for deployment in graph.deployments}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_graph_that_a_file_asks_for_is_made_and_has_every_deployment_it_overrides(file: Path) -> None:
    for application in config(file).applications:
        there = deployments(application)

        assert {override.name for override in application.deployments} <= there.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_answers_on_loopback_only_and_logs_json(file: Path) -> None:
    deploy = config(file)

    assert deploy.http_options.host == "127.0.0.1"
    assert deploy.logging_config is not None
    assert deploy.logging_config.encoding == "JSON"


def test_the_fleet_is_one_gateway_and_models_that_name_it() -> None:
    gateway, *models = config(ROOT / "configs/serve/fleet.yaml").applications

    assert gateway.import_path == "serve_app.app:build_gateway"
    assert {model.import_path for model in models} == {MODEL_BUILDER}
    assert {model.route_prefix for model in models} == {None}
    assert {ModelArgs.model_validate(model.args).gateway for model in models} == {gateway.name}


def test_each_pool_of_the_fleet_is_pinned_to_gpus_that_ray_knows_and_scales_from_zero() -> None:
    _, *models = config(ROOT / "configs/serve/fleet.yaml").applications
    pools = {
        name: pool for model in models for name, pool in deployments(model).items() if name != "VideoEncoder"
    }

    assert {"sd15", "sdxl-base-1.0", "flux.1-schnell", "flux.1-dev", "hunyuan-video"} < pools.keys()
    assert "lora-flux.1-schnell" in pools
    for pool in pools.values():
        assert pool.ray_actor_options["num_gpus"] > 0
        assert pool.ray_actor_options["accelerator_type"] in ACCELERATORS
        scaling = pool._deployment_config.autoscaling_config
        assert (scaling.min_replicas, scaling.max_replicas > 1) == (0, True)


def test_the_fleet_encodes_videos_on_cpus() -> None:
    _, *models = config(ROOT / "configs/serve/fleet.yaml").applications
    encoders = [
        pool for model in models for name, pool in deployments(model).items() if name == "VideoEncoder"
    ]

    assert [encoder.ray_actor_options["num_cpus"] for encoder in encoders] == [4]
    assert encoders[0].ray_actor_options["runtime_env"] == app.NO_GPU


def test_two_picture_models_share_the_one_gpu() -> None:
    (application,) = config(ROOT / "configs/serve/one_gpu.yaml").applications

    there = deployments(application)

    assert {"Ingress", "Dispatcher", "Adapters", "VideoEncoder", "pictures", "tiny-wan"} <= there.keys()
    assert sum(pool.ray_actor_options.get("num_gpus") or 0 for pool in there.values()) == 1


def test_an_application_of_models_that_share_nothing_is_refused_saying_what_to_do() -> None:
    with pytest.raises(BadRequest, match="give each an application of its own"):
        app.build_model(ModelArgs(models=["tiny-sd15", "tiny-wan"]))


def test_serving_of_a_card_may_be_otherwise_in_the_file_and_a_mistake_in_it_is_named() -> None:
    args = ModelArgs.model_validate({"models": [{"id": "tiny-sd15", "serving": {"slotz": 3}}]})

    with pytest.raises(BadRequest, match=r"serving of tiny-sd15 is not valid[\s\S]*slotz"):
        app.build_model(args)
    with pytest.raises(NotFound, match="there is no card 'tiny-sd'"):
        app.build_model(ModelArgs.model_validate({"models": [{"id": "tiny-sd", "serving": {}}]}))


def test_a_mistake_in_a_card_inside_the_file_is_reported_alone() -> None:
    card = yaml.safe_load((ROOT / "configs/models/tiny-sd15.yaml").read_text(encoding="utf-8"))

    with pytest.raises(ValidationError) as raised:
        ModelArgs.model_validate({"models": [card | {"tasks": ["t2x"]}]})

    assert [error["loc"] for error in raised.value.errors()] == [("models", 0, "card", "tasks")]


def test_the_keys_that_weft_serve_takes_are_those_of_serve() -> None:
    assert {*serve_config.CONFIG_KEYS} == {*ServeDeploySchema.model_fields}
    assert {*serve_config.APPLICATION_KEYS} == {*ServeApplicationSchema.model_fields}
    assert {*serve_config.HTTP_KEYS} == {*HTTPOptionsSchema.model_fields}
    assert all(hasattr(app, builder) for builder in serve_config.BUILDERS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_weft_serve_takes_the_files_that_ship(file: Path) -> None:
    taken = serve_config.read_config(file, None, None)

    assert taken["http_options"]["port"] == 8000
    assert serve_config.served_cards(taken, file)
