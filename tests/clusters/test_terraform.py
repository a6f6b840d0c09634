"""The Terraform module for AWS: its form, the file for `ray up` that it writes, and what its parts allow."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
MODULE = ROOT / "configs/terraform/aws"
TERRAFORM = shutil.which("terraform")
SHIPPED = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
PLACES = {
    "region": "eu-west-1",
    "zones": ["eu-west-1a", "eu-west-1b"],
    "image": "ami-1",
    "subnets": ["subnet-1", "subnet-2"],
    "node_group": "sg-nodes",
    "head_group": "sg-head",
    "head_profile": "weft-head",
    "worker_profile": "weft-worker",
    "weights": "fs-1.efs.eu-west-1.amazonaws.com",
    "max_workers": 3,
}

with_terraform = pytest.mark.skipif(TERRAFORM is None, reason="needs terraform")


def terraform(folder: Path, *arguments: str) -> str:
    assert TERRAFORM is not None
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "CHECKPOINT_DISABLE": "1"}
    done = subprocess.run(
        [TERRAFORM, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file for `ray up`, as Terraform writes it."""
    root = tmp_path_factory.mktemp("terraform")
    folder = root / "configs/terraform/aws/cluster_file"
    shutil.copytree(MODULE / "cluster_file", folder)
    shutil.copy(ROOT / "cluster.yaml", root)
    (folder / "terraform.tfvars.json").write_text(json.dumps(PLACES))
    terraform(folder, "init", "-input=false", "-no-color")
    terraform(folder, "apply", "-input=false", "-auto-approve", "-no-color")
    written: dict[str, Any] = yaml.safe_load(terraform(folder, "output", "-raw", "yaml"))
    return written


@with_terraform
def test_the_module_is_written_as_terraform_writes_it(tmp_path: Path) -> None:
    """It reads every file: a mistake in the syntax is an error here too."""
    terraform(tmp_path, "fmt", "-check", "-recursive", str(MODULE))


@with_terraform
def test_ray_takes_the_file_and_nothing_of_it_is_left_to_fill_in(made: dict[str, Any]) -> None:
    text = yaml.safe_dump(made)

    validate_config(prepare_config(made))

    assert not re.search(r"0000000000|us-west-2", text)
    assert made["max_workers"] == 3
    assert made["provider"] == SHIPPED["provider"] | {
        "region": "eu-west-1",
        "availability_zone": "eu-west-1a,eu-west-1b",
    }


@with_terraform
def test_nodes_are_in_groups_that_the_stores_admit_and_only_the_head_answers_callers(
    made: dict[str, Any],
) -> None:
    nodes = {name: kind["node_config"] for name, kind in made["available_node_types"].items()}

    assert {name for name, node in nodes.items() if "sg-head" in node["SecurityGroupIds"]} == {"head"}
    assert all("sg-nodes" in node["SecurityGroupIds"] for node in nodes.values())
    assert {name: node["IamInstanceProfile"]["Name"] for name, node in nodes.items()} == {
        name: "weft-head" if name == "head" else "weft-worker" for name in nodes
    }
    assert {node["ImageId"] for node in nodes.values()} == {"ami-1"}


@with_terraform
def test_all_else_is_the_file_that_ships(made: dict[str, Any]) -> None:
    ours = ("ImageId", "SubnetIds", "SecurityGroupIds", "IamInstanceProfile")
    for kind in made["available_node_types"].values():
        for key in ours:
            del kind["node_config"][key]
    shipped = {**SHIPPED, "available_node_types": {}}
    for name, kind in SHIPPED["available_node_types"].items():
        node = {key: value for key, value in kind["node_config"].items() if key not in ours}
        shipped["available_node_types"][name] = kind | {"node_config": node}

    different = {key for key in shipped if made[key] != shipped[key]}

    assert different == {"max_workers", "provider", "initialization_commands"}
    assert any(PLACES["weights"] in line for line in made["initialization_commands"])


def test_users_of_the_stores_are_those_that_ship_for_kubernetes() -> None:
    script = (ROOT / "configs/kuberay/secrets.sh").read_text()
    stores = (MODULE / "stores.tf").read_text()

    rules = re.findall(r"^user (app|ray) on >\$\w+ (.*)$", script, re.MULTILINE)

    assert [user for user, _ in rules] == ["app", "ray"]
    assert [user for user, rule in rules if not re.search(rf'"on {re.escape(rule)}"', stores)] == []


def test_the_head_may_give_workers_their_role_and_no_other() -> None:
    roles = (MODULE / "roles.tf").read_text()

    (passed,) = re.findall(r'"iam:PassRole"\].*\n\s*resources = \[(.*)\]', roles)

    assert passed == "aws_iam_role.worker.arn"


def test_only_nodes_reach_the_stores() -> None:
    network = (MODULE / "network.tf").read_text()

    stores = network.partition('resource "aws_security_group" "stores"')[2]

    assert "security_groups = [aws_security_group.nodes.id]" in stores
    assert "cidr_blocks" not in stores


def test_the_environment_that_it_writes_has_only_variables_that_nodes_know(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from serve_app.settings import Settings

    text = (MODULE / "main.tf").read_text().partition("value       = <<-EOT")[2].partition("EOT")[0]
    lines = [line.strip().split("=", 1) for line in text.strip().splitlines()]
    for name, value in lines:
        monkeypatch.setenv(name, re.sub(r"\$\{.*?\}", "x" * 32, value))
    monkeypatch.setenv("WEFT_DATA_DIR", str(tmp_path))

    settings = Settings.load()

    assert settings.results_root.startswith("s3://")
    assert settings.redis_url is not None
    assert settings.trusted_proxies
