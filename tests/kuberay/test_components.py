"""What configs/kubernetes adds to a platform: machines of one's own, Kueue, weights in an image."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.kuberay.builds import built, built_with, folder_of_manifests, of_kind
from tests.kuberay.manifests import longest_job_s, strict

ROOT = Path(__file__).parents[2]
PLATFORMS = ("eks", "gke", "aks", "bare-metal")
KUBERNETES = "1.33"
SCHEMAS = json.loads((Path(__file__).parent / "operators.json").read_text())
GPU_GROUPS = ("gpu-24gb", "gpu-48gb", "gpu-80gb")
ALLOWED_VOLUMES = {"configMap", "emptyDir", "image", "persistentVolumeClaim", "secret"}  # of level restricted
UNITS = {"Gi": 2**30, "m": 1e-3, "": 1}

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")

Manifests = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_manifests(tmp_path_factory.mktemp("components"))


@pytest.fixture(scope="module")
def bare_metal(folder: Path) -> Manifests:
    return built(folder / "bare-metal")


@pytest.fixture(scope="module", params=PLATFORMS)
def with_kueue(folder: Path, request: pytest.FixtureRequest) -> Manifests:
    return built_with(folder, request.param, "kueue")


@pytest.fixture(scope="module", params=PLATFORMS)
def with_weights(folder: Path, request: pytest.FixtureRequest) -> Manifests:
    return built_with(folder, request.param, "model-image")


def groups(manifests: Manifests) -> dict[str, dict[str, Any]]:
    (service,) = of_kind(manifests, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    return {one["groupName"]: one for one in cluster["workerGroupSpecs"]} | {"head": cluster["headGroupSpec"]}


def named(manifests: Manifests, kind: str, name: str) -> dict[str, Any]:
    (found,) = [one for one in of_kind(manifests, kind) if one["metadata"]["name"] == name]
    return found


def amount(quantity: str | float) -> float:
    """The number that a quantity of Kubernetes means."""
    match = re.fullmatch(r"([\d.]+)(\D*)", str(quantity))
    assert match is not None
    return float(match[1]) * UNITS[match[2]]


def check(manifest: dict[str, Any]) -> None:
    """Fails unless the manifest fits the schema of its operator, and that schema refuses a typing error."""
    schema = jsonschema.Draft7Validator(strict(SCHEMAS[manifest["kind"]]))
    schema.validate(manifest)
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        schema.validate(wrong)


def check_pods(manifests: Manifests) -> None:
    for name, group in groups(manifests).items():
        spec = group["template"]["spec"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        for volume in spec["volumes"]:
            assert volume.keys() - {"name"} <= ALLOWED_VOLUMES


def test_machines_of_ones_own_are_chosen_by_the_labels_that_the_file_names(bare_metal: Manifests) -> None:
    text = (ROOT / "configs/kubernetes/bare-metal/kustomization.yaml").read_text(encoding="utf-8")
    (label,) = re.findall(r"kubectl label node NAME (\S+)=24gb", text)

    found = {name: groups(bare_metal)[name]["template"]["spec"]["nodeSelector"] for name in GPU_GROUPS}

    assert found == {name: {label: name.removeprefix("gpu-")} for name in GPU_GROUPS}
    check_pods(bare_metal)


def test_weights_are_on_the_disk_of_each_machine_and_results_on_a_shared_one(bare_metal: Manifests) -> None:
    volume = named(bare_metal, "PersistentVolume", "weft-models")
    models = named(bare_metal, "PersistentVolumeClaim", "models")
    outputs = named(bare_metal, "PersistentVolumeClaim", "outputs")

    kubernetes_validate.validate(volume, KUBERNETES, strict=True)
    assert models["spec"]["volumeName"] == volume["metadata"]["name"]
    assert models["spec"]["storageClassName"] == volume["spec"]["storageClassName"] == ""
    assert volume["spec"]["claimRef"] == {"namespace": models["metadata"]["namespace"], "name": "models"}
    assert set(models["spec"]["accessModes"]) <= set(volume["spec"]["accessModes"])
    assert amount(volume["spec"]["capacity"]["storage"]) >= amount(
        models["spec"]["resources"]["requests"]["storage"]
    )
    assert "nodeAffinity" not in volume["spec"], "pods of all machines use it"
    assert outputs["spec"]["storageClassName"] not in ("", "shared")
    assert outputs["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_addresses_of_metallb_fit_its_schemas(bare_metal: Manifests) -> None:
    pool, advertisement = (of_kind(bare_metal, kind)[0] for kind in ("IPAddressPool", "L2Advertisement"))

    check(pool)
    check(advertisement)

    assert advertisement["spec"]["ipAddressPools"] == [pool["metadata"]["name"]]
    assert {one["metadata"]["namespace"] for one in (pool, advertisement)} == {"metallb-system"}


def test_kueue_admits_each_gpu_pod_and_never_the_service_as_a_whole(with_kueue: Manifests) -> None:
    (service,) = of_kind(with_kueue, "RayService")
    queue = named(with_kueue, "LocalQueue", "weft")
    found = groups(with_kueue)

    queued = {
        name: group["template"]["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
        for name, group in found.items()
    }

    assert queued == dict.fromkeys(found) | dict.fromkeys(GPU_GROUPS, queue["metadata"]["name"])
    assert "kueue.x-k8s.io/queue-name" not in service["metadata"].get("labels", {})
    assert queue["metadata"]["namespace"] == service["metadata"]["namespace"]
    assert queue["spec"]["clusterQueue"] == of_kind(with_kueue, "ClusterQueue")[0]["metadata"]["name"]
    check_pods(with_kueue)


def test_what_kueue_reads_fits_its_schemas(with_kueue: Manifests) -> None:
    for kind, count in (("ResourceFlavor", 3), ("ClusterQueue", 1), ("LocalQueue", 1)):
        found = of_kind(with_kueue, kind)
        assert len(found) == count
        for manifest in found:
            check(manifest)
            assert ("namespace" in manifest["metadata"]) is (kind == "LocalQueue")


def test_the_quota_of_each_flavor_holds_the_largest_group(with_kueue: Manifests) -> None:
    (queue,) = of_kind(with_kueue, "ClusterQueue")
    (resources,) = queue["spec"]["resourceGroups"]
    flavors = {one["metadata"]["name"] for one in of_kind(with_kueue, "ResourceFlavor")}

    assert {one["name"] for one in resources["flavors"]} == flavors == set(GPU_GROUPS)
    for flavor in resources["flavors"]:
        group = groups(with_kueue)[flavor["name"]]
        (container,) = group["template"]["spec"]["containers"]
        quota = {one["name"]: amount(one["nominalQuota"]) for one in flavor["resources"]}
        assert quota.keys() == set(resources["coveredResources"])
        for name, most in quota.items():
            assert most >= group["maxReplicas"] * amount(container["resources"]["requests"][name])


def test_a_flavor_has_the_selector_of_its_group_in_the_base() -> None:
    service = yaml.safe_load((ROOT / "configs/kuberay/rayservice.yaml").read_text(encoding="utf-8"))
    text = (ROOT / "configs/kubernetes/kueue/queues.yaml").read_text(encoding="utf-8")
    flavors = {
        one["metadata"]["name"]: one["spec"]["nodeLabels"]
        for one in yaml.safe_load_all(text)
        if one["kind"] == "ResourceFlavor"
    }

    base = {name: group["template"]["spec"].get("nodeSelector") for name, group in groups([service]).items()}

    assert flavors == {name: base[name] for name in GPU_GROUPS}


def test_serving_displaces_batch_work_and_not_the_other_way_round(with_kueue: Manifests) -> None:
    serving, batch = (named(with_kueue, "PriorityClass", f"weft-{name}") for name in ("serving", "batch"))

    for one in (serving, batch):
        kubernetes_validate.validate(one, KUBERNETES, strict=True)

    assert serving["value"] > 0 > batch["value"]
    assert batch["preemptionPolicy"] == "Never"
    classes = {
        name: group["template"]["spec"].get("priorityClassName") for name, group in groups(with_kueue).items()
    }
    assert {name for name, kind in classes.items() if kind == "weft-serving"} == {*GPU_GROUPS, "front"}


def test_weights_of_an_image_are_mounted_read_only_where_models_look_for_them(
    with_weights: Manifests,
) -> None:
    settings = named(with_weights, "ConfigMap", "weft")["data"]

    check_pods(with_weights)

    for name, group in groups(with_weights).items():
        spec = group["template"]["spec"]
        mounts = {one["name"]: one for one in spec["containers"][0]["volumeMounts"]}
        images = [one for one in spec["volumes"] if "image" in one]
        assert bool(images) is (name in GPU_GROUPS)
        for volume in images:
            assert mounts[volume["name"]]["mountPath"] == settings["MODEL_CHECKPOINT_DIR"]
            assert mounts[volume["name"]]["readOnly"] is True


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_old_cluster_lives_as_long_as_the_longest_job_on_every_platform(
    folder: Path, platform: str
) -> None:
    (service,) = of_kind(built(folder / platform), "RayService")

    longest = longest_job_s(yaml.safe_load(service["spec"]["serveConfigV2"]))

    assert longest >= 3600
    # it claims no job after the new one is ready; KubeRay begins to count when callers have moved, later
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > longest
