"""configs/kubernetes, built by kustomize: what each cloud changes in configs/kuberay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from tests.kuberay.builds import built, built_with, folder_of_manifests, kustomize, of_kind
from tests.kuberay.policies import End, admits

PLATFORMS = ("eks", "gke", "aks")
KUBERNETES = "1.33"
# labels that the autoscaler of the cloud's nodes knows of a node that does not exist yet
FROM_NOTHING = {"node.kubernetes.io/instance-type", "cloud.google.com/gke-accelerator"}
RAY = End("weft", {"app.kubernetes.io/component": "ray", "app.kubernetes.io/part-of": "weft"})

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_manifests(tmp_path_factory.mktemp("platforms"))


@pytest.fixture(scope="module")
def platforms(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: built(folder / name) for name in PLATFORMS}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_nodes_with_gpus_start_from_nothing(
    platforms: dict[str, list[dict[str, Any]]], platform: str
) -> None:
    (service,) = of_kind(platforms[platform], "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    groups = {one["groupName"]: one for one in cluster["workerGroupSpecs"]}
    resource = {"metadata": {"name": "weft", "namespace": "weft"}, "spec": cluster}

    types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]

    with_gpu = {name for name, kind in types.items() if kind["resources"].get("GPU")}
    assert with_gpu == {"gpu-24gb", "gpu-48gb", "gpu-80gb"}
    for name in groups:
        pod = groups[name]["template"]["spec"]
        assert (set(pod.get("nodeSelector", {})) <= FROM_NOTHING) is True
        assert bool(pod.get("nodeSelector")) == (name in with_gpu)
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod},
            KUBERNETES,
            strict=True,
        )
    schema = json.loads((Path(__file__).parent / "rayservice.json").read_text())
    jsonschema.Draft7Validator(schema).validate(service)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_volumes_are_of_a_class_of_the_cloud(
    platforms: dict[str, list[dict[str, Any]]], platform: str
) -> None:
    claims = of_kind(platforms[platform], "PersistentVolumeClaim")

    classes = {one["spec"]["storageClassName"] for one in claims}

    assert len(claims) == 2
    assert len(classes) == 1
    assert "shared" not in classes
    assert all(one["spec"]["accessModes"] == ["ReadWriteMany"] for one in claims)


def test_patches_of_groups_in_another_order_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder.parent, tmp_path / "configs")
    base = tmp_path / "configs/kuberay/rayservice.yaml"
    text = base.read_text(encoding="utf-8")
    base.write_text(text.replace("groupName: gpu-48gb", "groupName: gpu-96gb"), encoding="utf-8")

    run = kustomize(tmp_path / "configs/kubernetes/eks")

    assert run.returncode != 0
    assert "/groupName" in run.stderr


def test_pods_on_eks_reach_the_agent_that_gives_them_their_role(
    platforms: dict[str, list[dict[str, Any]]],
) -> None:
    policies = of_kind(platforms["eks"], "NetworkPolicy")
    agent, metadata = End(address="169.254.170.23"), End(address="169.254.169.254")

    assert admits(policies, RAY, agent, 80)
    assert not admits(policies, RAY, metadata, 80)  # the role of the node
    assert not admits(of_kind(platforms["aks"], "NetworkPolicy"), RAY, agent, 80)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_stores_of_the_cloud_replace_the_valkeys(
    folder: Path, platforms: dict[str, list[dict[str, Any]]], platform: str
) -> None:
    made = built_with(folder, platform, "managed-redis")
    store, stranger = End(address="10.3.4.5"), End(address="93.184.215.14")

    (service,) = of_kind(made, "RayService")
    assert of_kind(made, "StatefulSet") == of_kind(made, "Service") == []
    address = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"]
    assert address.startswith("rediss://")
    for port in (6379, 6380):
        assert admits(of_kind(made, "NetworkPolicy"), RAY, store, port)
        assert not admits(of_kind(made, "NetworkPolicy"), RAY, stranger, port)
        assert not admits(of_kind(platforms[platform], "NetworkPolicy"), RAY, store, port)
