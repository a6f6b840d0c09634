"""Ray's AWS provider launches the nodes of cluster.yaml, in moto: types, groups and roles."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

ROOT = Path(__file__).parents[2]
SHIPPED = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
TYPES = SHIPPED["available_node_types"]
REGION = "us-west-2"


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """cluster.yaml in an account that has what configs/terraform/aws makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray writes its key pair there
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        with mock_aws():
            yield _placed()


def _placed() -> dict[str, Any]:
    client, ec2 = boto3.client("ec2", region_name=REGION), boto3.resource("ec2", region_name=REGION)
    network = ec2.create_vpc(CidrBlock="10.64.0.0/16")
    zones = SHIPPED["provider"]["availability_zone"].split(",")
    subnets = [
        network.create_subnet(CidrBlock=f"10.64.{16 * index}.0/20", AvailabilityZone=zone).id
        for index, zone in enumerate(zones)
    ]
    for subnet in subnets:
        client.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
    nodes, head = (
        ec2.create_security_group(GroupName=name, Description=name, VpcId=network.id).id
        for name in ("weft-nodes", "weft-head")
    )
    for name in ("weft-head", "weft-worker"):
        boto3.client("iam").create_instance_profile(InstanceProfileName=name)
    config = copy.deepcopy(SHIPPED)
    for name, kind in config["available_node_types"].items():
        kind["node_config"] |= {
            "ImageId": client.describe_images()["Images"][0]["ImageId"],
            "SubnetIds": subnets,
            "SecurityGroupIds": [nodes, head] if name == "head" else [nodes],
            "IamInstanceProfile": {"Name": "weft-head" if name == "head" else "weft-worker"},
        }
    return config


def test_every_node_is_launched_in_groups_and_roles_that_were_there_before(placed: dict[str, Any]) -> None:
    ec2 = boto3.resource("ec2", region_name=REGION)
    groups_before = {group.id for group in ec2.security_groups.all()}
    made = bootstrap_aws(prepare_config(placed))
    provider = AWSNodeProvider(made["provider"], made["cluster_name"])

    launched = {}
    for name, kind in made["available_node_types"].items():
        tags = {TAG_RAY_USER_NODE_TYPE: name, TAG_RAY_NODE_KIND: NODE_KIND_WORKER}
        (identity,) = provider.create_node(kind["node_config"], tags, 1)
        launched[name] = ec2.Instance(identity)

    assert {name: node.instance_type for name, node in launched.items()} == {
        name: kind["node_config"]["InstanceType"] for name, kind in TYPES.items()
    }
    for name, node in launched.items():
        on_head = name == "head"
        groups = {group["GroupName"] for group in node.security_groups}
        assert groups == ({"weft-nodes", "weft-head"} if on_head else {"weft-nodes"})
        assert node.iam_instance_profile["Arn"].endswith("/weft-head" if on_head else "/weft-worker")
    assert {group.id for group in ec2.security_groups.all()} == groups_before
    roles = boto3.client("iam").list_instance_profiles()["InstanceProfiles"]
    assert {role["InstanceProfileName"] for role in roles} == {"weft-head", "weft-worker"}


@pytest.mark.usefixtures("placed")
@pytest.mark.parametrize("name", TYPES)
def test_what_the_file_says_of_a_type_is_what_aws_says(name: str) -> None:
    kind = TYPES[name]
    (facts,) = boto3.client("ec2", region_name=REGION).describe_instance_types(
        InstanceTypes=[kind["node_config"]["InstanceType"]]
    )["InstanceTypes"]
    gpus = facts.get("GpuInfo", {}).get("Gpus", [])
    said = [resource.partition(":")[2] for resource in kind["resources"] if ":" in resource]

    assert kind["resources"]["CPU"] == facts["VCpuInfo"]["DefaultVCpus"]
    assert kind["resources"]["GPU"] == sum(gpu["Count"] for gpu in gpus)
    assert said in ([], [gpu["Name"] for gpu in gpus])
