"""The files for `ray up` and serve_config.yaml, held against the schemas of the Ray that is installed."""

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
from serve_app import app
from serve_app.ray_serve import args

ROOT = Path(__file__).parent.parent
CLUSTERS = {
    file: yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    for file in ("cluster.yaml", "configs/clusters/gcp.yaml")
}
SERVE = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
APPLICATION = SERVE["applications"][0]
START = ("head_start_ray_commands", "worker_start_ray_commands")
SECRETS = {"~/weft/.env", "~/.ray/auth_token"}  # written by the operator, never in the repository


@pytest.fixture(params=CLUSTERS)
def written(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A file as it is in the repository."""
    return copy.deepcopy(CLUSTERS[request.param])


@pytest.fixture
def cluster(written: dict[str, Any]) -> dict[str, Any]:
    """The file as `ray up` sees it: with the provider's defaults filled in."""
    return prepare_config(written)


def test_the_cluster_file_fits_rays_own_schema(cluster: dict[str, Any]) -> None:
    validate_config(cluster)


def test_rays_schema_would_find_a_misspelt_node_type_key(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["head"]["min_worker"] = 0

    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        validate_config(cluster)


def test_the_head_has_no_gpu_and_workers_scale_from_nothing(written: dict[str, Any]) -> None:
    types = written["available_node_types"]
    workers = [kind for name, kind in types.items() if name != written["head_node_type"]]

    assert types["head"]["resources"]["GPU"] == 0
    assert len(workers) >= 4
    assert {kind["min_workers"] for kind in workers} == {0}
    assert [name for name, kind in types.items() if not kind["resources"]["GPU"]] == ["head", "cpu"]


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_every_node_has_the_weights_before_units_start_ray(written: dict[str, Any], kind: str) -> None:
    before = written["initialization_commands"]

    assert written[f"{kind}_start_ray_commands"] == [f"~/weft/configs/clusters/units.sh {kind}"]
    assert any("/mnt/models nfs4" in line and "x-systemd.automount" in line for line in before)
    assert before[-2].endswith("sudo mount /mnt/models")


def test_no_command_ends_in_a_comment(written: dict[str, Any]) -> None:
    """Ray puts commands into others, whose rest a comment would swallow."""
    kinds = ("initialization_commands", "setup_commands", *START)
    commands = [line for kind in kinds for line in written[kind]]

    assert [line for line in commands if " #" in line] == []


def test_every_file_that_nodes_get_is_in_the_repository_except_the_secrets(written: dict[str, Any]) -> None:
    sources = {remote: local for remote, local in written["file_mounts"].items() if remote not in SECRETS}

    assert set(written["file_mounts"]) >= SECRETS
    assert [local for local in sources.values() if not (ROOT / local).exists()] == []


def test_nodes_install_the_exact_versions_of_the_constraints_file(written: dict[str, Any]) -> None:
    install = next(line for line in written["setup_commands"] if "pip install" in line)
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
