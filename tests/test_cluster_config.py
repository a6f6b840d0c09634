"""cluster.yaml and serve_config.yaml, held against the schemas of the Ray that is installed."""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from deployments.protocol.card import load_cards
from serve_app import app, args

ROOT = Path(__file__).parent.parent
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
SERVE = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
APPLICATION = SERVE["applications"][0]
START = ("head_start_ray_commands", "worker_start_ray_commands")
GPU_TYPES = ("gpu-a10g", "gpu-a100", "gpu-h100")
SECRETS = {"~/weft/.env", "~/.ray/auth_token"}  # written by the operator, never in the repository


@pytest.fixture
def cluster() -> dict[str, Any]:
    """The file as `ray up` sees it: with the provider's defaults filled in."""
    return prepare_config(copy.deepcopy(CLUSTER))


def test_the_cluster_file_fits_rays_own_schema(cluster: dict[str, Any]) -> None:
    validate_config(cluster)


def test_rays_schema_would_find_a_misspelt_node_type_key(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["head"]["min_worker"] = 0

    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        validate_config(cluster)


def test_the_head_has_no_gpu_and_workers_scale_from_nothing() -> None:
    types = CLUSTER["available_node_types"]

    assert types["head"]["resources"]["GPU"] == 0
    assert set(types) == {CLUSTER["head_node_type"], *GPU_TYPES}
    assert [types[name]["min_workers"] for name in GPU_TYPES] == [0, 0, 0]
    assert all(types[name]["resources"]["GPU"] >= 1 for name in GPU_TYPES)


@pytest.mark.parametrize("commands", START)
def test_every_node_starts_ray_with_a_token_and_the_environment_file(commands: str) -> None:
    start = CLUSTER[commands][-1]

    assert "export RAY_AUTH_MODE=token" in start
    assert ". ~/weft/.env" in start
    assert "${REDIS_URL:?" in start


def test_the_dashboard_listens_on_loopback_only() -> None:
    start = CLUSTER["head_start_ray_commands"][-1]

    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in start


def test_every_file_that_nodes_get_is_in_the_repository_except_the_secrets() -> None:
    sources = {remote: local for remote, local in CLUSTER["file_mounts"].items() if remote not in SECRETS}

    assert set(CLUSTER["file_mounts"]) >= SECRETS
    assert [local for local in sources.values() if not (ROOT / local).exists()] == []


def test_nodes_install_the_exact_versions_of_the_constraints_file() -> None:
    install = next(line for line in CLUSTER["setup_commands"] if "pip install" in line)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()

    assert "-c constraints.txt" in install
    assert f"ray=={version('ray')}" in pins


def test_the_serve_file_fits_serves_own_schema() -> None:
    deploy = ServeDeploySchema.model_validate(SERVE)

    assert [application.name for application in deploy.applications] == ["weft"]


def test_the_serve_file_names_our_builder_with_arguments_it_takes() -> None:
    module, _, builder = APPLICATION["import_path"].partition(":")

    given = args.AppArgs.model_validate(APPLICATION["args"])

    assert module == app.__name__
    assert callable(getattr(app, builder))
    assert {str(model) for model in given.models} <= set(load_cards(ROOT / "configs/models"))


def test_the_serve_file_answers_on_loopback_only() -> None:
    assert SERVE["http_options"]["host"] == "127.0.0.1"
