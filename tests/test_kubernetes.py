"""configs/kuberay, held against Kubernetes' schemas, KubeRay's, Ray's and Serve's, and against itself."""

from __future__ import annotations

import copy
import inspect
import json
import re
import shutil
import subprocess
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.dashboard.consts import DASHBOARD_METRIC_PORT
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from serve_app.settings import Settings
from tests.kuberay.manifests import longest_job_s, strict

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs/kuberay"
KUBERNETES = "1.33"  # the oldest version we look at; newer ones drop nothing of what we use
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text(encoding="utf-8"))
FILES = KUSTOMIZATION["resources"]


def manifests() -> list[dict[str, Any]]:
    found = []
    for file in FILES:
        found += list(yaml.safe_load_all((FOLDER / file).read_text(encoding="utf-8")))
    return found


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [one for one in manifests() if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


SERVICE = named("RayService", "weft")
CLUSTER = SERVICE["spec"]["rayClusterConfig"]
GROUPS = {"head": CLUSTER["headGroupSpec"]} | {one["groupName"]: one for one in CLUSTER["workerGroupSpecs"]}
PODS = {name: group["template"] for name, group in GROUPS.items()}
SERVE = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
STORES = ("valkey", "valkey-ray")
OTHER_SCHEMAS = json.loads((ROOT / "tests/kuberay/resources.json").read_text())


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What secrets.sh writes: file name to its variables, or lines."""
    folder = tmp_path_factory.mktemp("kuberay")
    shutil.copy(FOLDER / "secrets.sh", folder)
    subprocess.run(["sh", "secrets.sh"], cwd=folder, check=True, capture_output=True)
    files = {path.name: path.read_text() for path in (folder / "secrets").iterdir()}
    return {
        name: dict(line.split("=", 1) for line in text.splitlines()) if name.endswith(".env") else {"": text}
        for name, text in files.items()
    }


def ray_service_schema() -> dict[str, Any]:
    return with_metadata(json.loads((ROOT / "tests/kuberay/rayservice.json").read_text()))


def with_metadata(schema: dict[str, Any]) -> dict[str, Any]:
    schema = copy.deepcopy(schema)
    annotations = {"type": "object", "additionalProperties": {"type": "string"}}
    schema["properties"]["metadata"]["properties"] = {"name": {"type": "string"}}
    made = dict(strict(schema))
    made["properties"]["metadata"]["properties"]["annotations"] = annotations
    return made


def test_every_manifest_fits_kubernetes_own_schema_and_has_no_unknown_field() -> None:
    plain = [one for one in manifests() if one["kind"] not in {"RayService", *OTHER_SCHEMAS}]

    for manifest in plain:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)

    assert {one["kind"] for one in plain} >= {
        *("Namespace", "PersistentVolumeClaim", "StatefulSet", "Service", "NetworkPolicy"),
        *("ServiceAccount", "PodDisruptionBudget"),
    }


@pytest.mark.parametrize("kind", ["Gateway", "HTTPRoute", "PodMonitor"])
def test_what_operators_read_fits_their_schemas_and_has_no_unknown_field(kind: str) -> None:
    schema = jsonschema.Draft7Validator(with_metadata(OTHER_SCHEMAS[kind]))
    manifest = named(kind, "weft")

    schema.validate(manifest)

    manifest["spec"]["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        schema.validate(manifest)


def test_the_ray_service_fits_kuberays_schema_and_has_no_unknown_field() -> None:
    jsonschema.Draft7Validator(ray_service_schema()).validate(SERVICE)


@pytest.mark.parametrize("path", [(), ("spec",), ("spec", "rayClusterConfig", "gcsFaultToleranceOptions")])
def test_a_misspelt_field_would_be_found(path: tuple[str, ...]) -> None:
    wrong = copy.deepcopy(SERVICE)
    place = wrong
    for key in path:
        place = place[key]
    place["misspelt"] = 1

    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        jsonschema.Draft7Validator(ray_service_schema()).validate(wrong)


@pytest.mark.parametrize("group", PODS)
def test_every_pod_fits_kubernetes_own_schema(group: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group}, "spec": PODS[group]["spec"]}

    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_rays_autoscaler_reads_the_groups_and_gpu_nodes_start_from_nothing() -> None:
    resource = {"metadata": {"name": "weft", "namespace": "weft"}, "spec": CLUSTER}

    config = _derive_autoscaling_config_from_ray_cr(resource)

    types = config["available_node_types"]
    assert CLUSTER["enableInTreeAutoscaling"] is True
    assert {name: types[name]["min_workers"] for name in types if name.startswith("gpu-")} == {
        "gpu-24gb": 0,
        "gpu-48gb": 0,
        "gpu-80gb": 0,
    }
    assert types["encoder"]["min_workers"] == 0
    assert types["front"]["min_workers"] >= 2
    assert "GPU" not in types["headgroup"]["resources"]
    assert types["headgroup"]["resources"]["CPU"] == 0


def builder_and_args(application: dict[str, Any]) -> tuple[Any, Any]:
    module, _, name = application["import_path"].partition(":")
    builder = getattr(import_module(module), name)
    (parameter,) = inspect.signature(builder).parameters.values()
    return builder, parameter.annotation.model_validate(application["args"])


@pytest.fixture(scope="module")
def demands() -> dict[str, dict[str, float]]:
    """Of every deployment that the Serve config makes, what one replica claims of a node."""
    found = {}
    for application in SERVE["applications"]:
        overrides = {one["name"]: one for one in application.get("deployments", [])}
        builder, args = builder_and_args(application)
        built = build_app(builder(args), name=application["name"])
        assert overrides.keys() <= {deployment.name for deployment in built.deployments}
        for deployment in built.deployments:
            options = deployment.ray_actor_options
            options = overrides.get(deployment.name, {}).get("ray_actor_options", options)
            kind = options.get("accelerator_type")
            found[deployment.name] = {
                "CPU": options.get("num_cpus", 1),
                "GPU": options.get("num_gpus", 0),
                **options.get("resources", {}),
                **({f"accelerator_type:{kind}": 0.001} if kind else {}),
            }
    return found


def test_every_deployment_fits_a_node_of_some_group(demands: dict[str, dict[str, float]]) -> None:
    resource = {"metadata": {"name": "weft", "namespace": "weft"}, "spec": CLUSTER}
    types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]

    homeless = {
        name: need
        for name, need in demands.items()
        if not any(
            all(kind["resources"].get(resource, 0) >= amount for resource, amount in need.items())
            for kind in types.values()
        )
    }

    assert homeless == {}
    assert len([need for need in demands.values() if need["GPU"]]) >= 5


def test_each_deployment_has_nodes_of_one_group(demands: dict[str, dict[str, float]]) -> None:
    """On another's it would keep a GPU node from ending, or end with it."""
    resource = {"metadata": {"name": "weft", "namespace": "weft"}, "spec": CLUSTER}
    types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]

    homes = {
        name: [
            group
            for group, kind in types.items()
            if all(kind["resources"].get(resource, 0) >= amount for resource, amount in need.items())
        ]
        for name, need in demands.items()
    }

    on_cpus = {name: homes[name] for name, need in demands.items() if not need["GPU"]}
    assert on_cpus == {
        "Ingress": ["front"],
        "Dispatcher": ["front"],
        "Adapters": ["front"],
        "VideoEncoder": ["encoder"],
    }
    assert {name: len(groups) for name, groups in homes.items() if len(groups) != 1} == {}


def test_an_old_cluster_lives_as_long_as_the_longest_job() -> None:
    longest = longest_job_s(SERVE)

    assert longest >= 3600
    assert SERVICE["spec"]["rayClusterDeletionDelaySeconds"] > longest


def test_callers_reach_the_proxies_of_front_nodes_only() -> None:
    (port,) = SERVICE["spec"]["serveService"]["spec"]["ports"]
    named_so = {
        name
        for name, pod in PODS.items()
        if port["targetPort"] in {one["name"] for one in pod["spec"]["containers"][0]["ports"]}
    }

    # pods without a port of the name that a Service targets are not among its addresses
    assert named_so - {"front"} == {"head"}
    assert SERVICE["spec"]["excludeHeadPodFromServeSvc"] is True


def test_front_pods_are_spread_and_leave_one_after_another() -> None:
    budget = named("PodDisruptionBudget", "front")["spec"]
    front = PODS["front"]
    by_host = front["spec"]["topologySpreadConstraints"][0]

    # KubeRay adds ray.io/group; of its pods Kubernetes reads no other form of a budget than this
    assert (
        budget["selector"]["matchLabels"].items()
        <= (front["metadata"]["labels"] | {"ray.io/group": "front"}).items()
    )
    assert budget["minAvailable"] == GROUPS["front"]["minReplicas"] - 1
    assert (by_host["topologyKey"], by_host["whenUnsatisfiable"]) == (
        "kubernetes.io/hostname",
        "DoNotSchedule",
    )
    busy = {name for name, pod in PODS.items() if "annotations" in pod["metadata"]}
    assert busy == PODS.keys() - {"front"}


def test_links_have_the_name_that_the_gateway_answers_to() -> None:
    (variables,) = [one["literals"] for one in KUSTOMIZATION["configMapGenerator"] if one["name"] == "weft"]
    settings = dict(line.split("=", 1) for line in variables)
    (listener,) = named("Gateway", "weft")["spec"]["listeners"]

    assert settings["WEFT_PUBLIC_URL"] == f"https://{listener['hostname']}"
    assert listener["protocol"] == "HTTPS"
    for pod in PODS.values():
        (container,) = pod["spec"]["containers"]
        assert {"configMapRef": {"name": "weft"}} in container["envFrom"]
        mounts = [one["mountPath"] for one in container["volumeMounts"]]
        kept = {one["name"]: one["value"] for one in container["env"]}
        assert all(kept[name].startswith("/models/") for name in ("HF_HOME", "WEFT_MODEL_CACHE"))
        assert "/models" in mounts


def test_the_serve_config_fits_serves_schema() -> None:
    config = ServeDeploySchema.model_validate(SERVE)

    assert config.applications[0].route_prefix == "/"


def test_the_serve_config_is_the_fleets_but_for_where_it_runs() -> None:
    fleet = yaml.safe_load((ROOT / "configs/serve/fleet.yaml").read_text(encoding="utf-8"))

    def without_places(config: dict[str, Any]) -> list[dict[str, Any]]:
        applications = copy.deepcopy(config["applications"])
        for application in applications:
            for model in application["args"].get("models", []):
                model["serving"].pop("accelerator_type", None)  # clouds offer different ones
            for deployment in (overrides := application.pop("deployments", [])):
                deployment.pop("ray_actor_options", None)
                deployment.pop("max_replicas_per_node", None)
            application["overrides"] = [one for one in overrides if len(one) > 1]
        return applications

    assert without_places(SERVE) == without_places(fleet)
    assert SERVE["http_options"] == fleet["http_options"] | {"host": "0.0.0.0"}


def test_ray_is_the_version_of_the_constraints_and_asks_for_a_token() -> None:
    assert CLUSTER["rayVersion"] == version("ray")
    assert CLUSTER["authOptions"] == {"mode": "token", "secretName": "ray"}


def test_ports_that_others_name_are_ports_of_the_pods() -> None:
    serve_port = SERVE["http_options"]["port"]
    (backend,) = named("HTTPRoute", "weft")["spec"]["rules"][0]["backendRefs"]
    (service_port,) = SERVICE["spec"]["serveService"]["spec"]["ports"]
    ports = {
        name: {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        for name, pod in PODS.items()
    }
    policies = [named("NetworkPolicy", name)["spec"]["ingress"] for name in ("ray", "front")]
    opened = {port["port"] for rules in policies for rule in rules for port in rule.get("ports", [])}
    scraped = {one["port"] for one in named("PodMonitor", "weft")["spec"]["podMetricsEndpoints"]}

    assert backend == {"name": f"{SERVICE['metadata']['name']}-serve-svc", "port": service_port["port"]}
    assert backend["name"] == SERVICE["spec"]["serveService"]["metadata"]["name"]
    assert {found["serve"] for found in ports.values() if "serve" in found} == {serve_port}
    assert opened == {serve_port, ports["head"]["dashboard"], 52365} | {
        ports["head"][name] for name in scraped
    }
    assert all("metrics" in found for found in ports.values())
    assert (ports["head"]["as-metrics"], ports["head"]["dash-metrics"]) == (
        AUTOSCALER_METRIC_PORT,
        DASHBOARD_METRIC_PORT,
    )
    for store in STORES:
        (container,) = named("StatefulSet", store)["spec"]["template"]["spec"]["containers"]
        assert named("Service", store)["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
        assert f"port {container['ports'][0]['containerPort']}" in (FOLDER / "valkey.conf").read_text()


def test_policies_and_services_select_pods_that_exist() -> None:
    ours = [named("StatefulSet", store)["spec"]["template"]["metadata"]["labels"] for store in STORES]
    ours += [pod["metadata"]["labels"] | {"ray.io/group": name} for name, pod in PODS.items()]
    selectors = [one["spec"]["podSelector"].get("matchLabels", {}) for one in manifests() if policy(one)]
    for one in filter(policy, manifests()):
        for rule in [*one["spec"].get("ingress", []), *one["spec"].get("egress", [])]:
            peers = [*rule.get("from", []), *rule.get("to", [])]
            selectors += [peer["podSelector"]["matchLabels"] for peer in peers if "podSelector" in peer]
    selectors += [named("Service", store)["spec"]["selector"] for store in STORES]
    selectors.append(named("PodMonitor", "weft")["spec"]["selector"]["matchLabels"])

    empty = [want for want in selectors if not any(want.items() <= labels.items() for labels in ours)]

    assert empty == []
    assert len(selectors) >= 8


def policy(manifest: dict[str, Any]) -> bool:
    return bool(manifest["kind"] == "NetworkPolicy")


def test_volumes_secrets_and_config_maps_that_pods_name_exist(secrets: dict[str, dict[str, str]]) -> None:
    generated = {one["name"] for one in KUSTOMIZATION["secretGenerator"]}
    maps = {one["name"] for one in KUSTOMIZATION["configMapGenerator"]}
    claims = {one["metadata"]["name"] for one in manifests() if one["kind"] == "PersistentVolumeClaim"}
    accounts = {one["metadata"]["name"] for one in manifests() if one["kind"] == "ServiceAccount"}
    stores = [named("StatefulSet", store)["spec"] for store in STORES]

    for pod in [*(store["template"] for store in stores), *PODS.values()]:
        volumes = {one["name"]: one for one in pod["spec"].get("volumes", [])}
        (container,) = pod["spec"]["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        own = {"data"} if pod not in PODS.values() else set()
        assert mounted <= volumes.keys() | own
        for volume in volumes.values():
            assert volume.get("persistentVolumeClaim", {}).get("claimName", "models") in claims
            assert volume.get("secret", {}).get("secretName", "weft") in generated
            assert volume.get("configMap", {}).get("name", "valkey") in maps
        for source in container.get("envFrom", []):
            assert source.get("secretRef", {}).get("name", "weft") in generated
            assert source.get("configMapRef", {}).get("name", "weft") in maps
        assert pod["spec"].get("serviceAccountName", "weft") in accounts
    assert [one["metadata"]["name"] for store in stores for one in store["volumeClaimTemplates"]] == [
        *("data", "data")
    ]
    fault_tolerance = CLUSTER["gcsFaultToleranceOptions"]
    named_keys = [
        fault_tolerance[key]["valueFrom"]["secretKeyRef"] for key in ("redisUsername", "redisPassword")
    ]
    assert {one["name"] for one in named_keys} == {CLUSTER["authOptions"]["secretName"]} == {"ray"}
    assert {one["key"] for one in named_keys} | {"auth_token"} == secrets["ray.env"].keys()
    assert fault_tolerance["redisAddress"] == "valkey-ray:6379"
    assert set(secrets) == {path.split("/")[1] for path in generated_files()}


def generated_files() -> list[str]:
    generators = KUSTOMIZATION["secretGenerator"]
    paths = [path for one in generators for path in [*one.get("envs", []), *one.get("files", [])]]
    return [path.rpartition("=")[2] for path in paths]


def test_the_secrets_are_settings_and_open_the_valkey(
    secrets: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in secrets["weft.env"].items():
        monkeypatch.setenv(name, value)
    users, users_of_ray = secrets["valkey.acl"][""], secrets["valkey-ray.acl"][""]

    settings = Settings.load()

    assert settings.redis_url is not None
    password = re.fullmatch(r"redis://app:(\w{64})@valkey:6379/0", settings.redis_url.get_secret_value())
    assert password is not None
    assert f"user app on >{password[1]} " in users
    assert f"user ray on >{secrets['ray.env']['redis_password']} " in users_of_ray
    assert "user ray" not in users
    assert "user app" not in users_of_ray
    assert all("user default off" in text for text in (users, users_of_ray))
    assert len({*secrets["weft.env"].values(), *secrets["ray.env"].values()}) == 6


def test_secrets_are_not_replaced_by_a_second_call(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "secrets.sh", tmp_path)
    subprocess.run(["sh", "secrets.sh"], cwd=tmp_path, check=True, capture_output=True)
    before = (tmp_path / "secrets/weft.env").read_text()

    again = subprocess.run(["sh", "secrets.sh"], cwd=tmp_path, check=False, capture_output=True, text=True)

    assert again.returncode == 1
    assert "secrets/ exists" in again.stderr
    assert (tmp_path / "secrets/weft.env").read_text() == before
    assert (tmp_path / "secrets/weft.env").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("group", PODS)
def test_pods_run_as_an_unprivileged_user_and_have_probes(group: str) -> None:
    spec = PODS[group]["spec"]
    (container,) = spec["containers"]

    assert spec["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    writable = {one["name"] for one in spec["volumes"] if one.keys() & {"emptyDir", "persistentVolumeClaim"}}
    places = {one["mountPath"] for one in container["volumeMounts"] if one["name"] in writable}
    assert places == {"/tmp", "/models", "/outputs"}
    assert {"livenessProbe", "readinessProbe"} <= container.keys()
    # Kubernetes would set WEFT_SERVE_SVC_PORT and the like, and settings refuse what they do not know
    assert spec["enableServiceLinks"] is False
    assert all(one["name"] != "WEFT" and "value" in one for one in container["env"])


def test_the_valkey_keeps_accepted_jobs_on_disk() -> None:
    conf = (FOLDER / "valkey.conf").read_text()

    assert "appendfsync always" in conf
    assert "maxmemory-policy noeviction" in conf


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kustomize_builds_it_with_our_images(tmp_path: Path) -> None:
    folder = tmp_path / "kuberay"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("secrets"))
    subprocess.run(["sh", "secrets.sh"], cwd=folder, check=True, capture_output=True)

    built = subprocess.run(["kubectl", "kustomize", str(folder)], check=True, capture_output=True, text=True)

    made = list(yaml.safe_load_all(built.stdout))
    (service,) = [one for one in made if one["kind"] == "RayService"]
    groups = [service["spec"]["rayClusterConfig"]["headGroupSpec"]]
    groups += service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    (image,) = KUSTOMIZATION["images"]
    assert images == {f"{image['newName']}:{image['newTag']}"}
    assert {one["metadata"]["namespace"] for one in made if one["kind"] != "Namespace"} == {"weft"}
