"""The Terraform modules: their form, the files for `ray up` that they write, and what their parts allow."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from serve_app.settings import Settings

ROOT = Path(__file__).parents[2]
MODULES = ROOT / "configs/terraform"
MODULE = MODULES / "aws"
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

PLACES_ON_GOOGLE = {
    "project": "pictures-1",
    "region": "europe-west4",
    "zone": "europe-west4-b",
    "subnetwork": "https://google/subnetworks/weft-nodes",
    "node_tag": "weft-node",
    "head_tag": "weft-head",
    "weights": "10.1.2.3",
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


def made_of(cloud: str, shipped: Path, places: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """The file for `ray up`, as Terraform writes it in a copy of the repository at `root`."""
    folder = root / f"configs/terraform/{cloud}/cluster_file"
    shutil.copytree(MODULES / cloud / "cluster_file", folder)
    (root / shipped).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / shipped, root / shipped)
    (folder / "terraform.tfvars.json").write_text(json.dumps(places))
    terraform(folder, "init", "-input=false", "-no-color")
    terraform(folder, "apply", "-input=false", "-auto-approve", "-no-color")
    written: dict[str, Any] = yaml.safe_load(terraform(folder, "output", "-raw", "yaml"))
    return written


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """That of AWS."""
    return made_of("aws", Path("cluster.yaml"), PLACES, tmp_path_factory.mktemp("aws"))


@pytest.fixture(scope="module")
def made_for_google(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return made_of("gcp", Path("configs/clusters/gcp.yaml"), PLACES_ON_GOOGLE, tmp_path_factory.mktemp("gcp"))


@with_terraform
def test_the_modules_are_written_as_terraform_writes_them(tmp_path: Path) -> None:
    """It reads every file: a mistake in the syntax is an error here too."""
    terraform(tmp_path, "fmt", "-check", "-recursive", str(MODULES))


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_what_a_module_names_it_declares(cloud: str) -> None:
    """`terraform validate` would say so, too, but needs the providers, which only their registry has."""
    text = "\n".join(file.read_text() for file in sorted((MODULES / cloud).glob("*.tf")))
    declared = {f"{kind}.{name}" for kind, name in re.findall(r'^resource "(\w+)" "(\w+)"', text, re.M)}
    declared |= {f"data.{kind}.{name}" for kind, name in re.findall(r'^data "(\w+)" "(\w+)"', text, re.M)}
    declared |= {f"var.{name}" for name in re.findall(r'^variable "(\w+)"', text, re.M)}
    declared |= {
        f"local.{name}"
        for block in re.findall(r"^locals \{\n(.*?)^\}", text, re.M | re.S)
        for name in re.findall(r"^  (\w+) +=", block, re.M)
    }

    named = set(re.findall(r"(?<![\w./])(?:data\.)?(?:aws|google|random)_\w+\.\w+", text))
    named |= set(re.findall(r"(?<![\w./])(?:var|local)\.\w+", text))

    assert len(named) >= 20
    assert named <= declared
    assert {name for name in declared if name.startswith(("var.", "local."))} <= named, "unused"


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


@with_terraform
def test_ray_takes_the_file_for_google_with_its_network_disks_and_weights(
    made_for_google: dict[str, Any],
) -> None:
    nodes = {name: kind["node_config"] for name, kind in made_for_google["available_node_types"].items()}

    validate_config(prepare_config(made_for_google))

    assert not re.search(r"us-central1|my-project|10\.0\.0\.2", yaml.safe_dump(made_for_google))
    assert {name for name, node in nodes.items() if "weft-head" in node["tags"]["items"]} == {"head"}
    for node in nodes.values():
        assert node["networkInterfaces"][0]["subnetwork"] == PLACES_ON_GOOGLE["subnetwork"]
        assert node["disks"][0]["initializeParams"]["sourceImage"].startswith(
            "projects/deeplearning-platform"
        )
    assert any("10.1.2.3:/models" in line for line in made_for_google["initialization_commands"])


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


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_environment_that_a_module_writes_is_one_that_weft_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cloud: str
) -> None:
    text = (MODULES / cloud / "main.tf").read_text().partition("value       = <<-EOT")[2].partition("EOT")[0]
    lines = [line.strip().split("=", 1) for line in text.strip().splitlines()]
    for name, value in lines:
        monkeypatch.setenv(name, re.sub(r"\$\{.*?\}", "x" * 32, value))
    monkeypatch.setenv("WEFT_DATA_DIR", str(tmp_path))

    settings = Settings.load()

    assert settings.results_root.startswith("s3://")
    assert settings.redis_url is not None
    assert settings.trusted_proxies
