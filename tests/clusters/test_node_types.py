"""Ray's own scheduler on the node types that ship: which node a request starts."""

from __future__ import annotations

import inspect
import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingReply, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest
from ray.core.generated.instance_manager_pb2 import Instance, NodeKind
from ray.serve._private.build_app import build_app

ROOT = Path(__file__).parents[2]
FILES = {"aws": ROOT / "cluster.yaml", "gcp": ROOT / "configs/clusters/gcp.yaml"}
CLUSTERS = {name: yaml.safe_load(file.read_text(encoding="utf-8")) for name, file in FILES.items()}
Need = Mapping[str, float]

GATEWAY = ["Ingress", "Ingress", "Dispatcher", "Dispatcher", "Adapters"]  # they run all the time
SDXL, FLUX, LORAS, SD15 = "sdxl-base-1.0", "flux.1-schnell", "lora-flux.1-schnell", "sd15"
VIDEO, ENCODER = "hunyuan-video", "VideoEncoder"
ON_AWS = {  # replicas that are asked for -> nodes that are started, beside the head
    "nothing": ([], {}),
    "a picture of SDXL": ([SDXL], {"gpu-a10g": 1}),
    "a picture of Stable Diffusion 1.5": ([SD15], {"gpu-a10g": 1}),
    "a picture of FLUX": ([FLUX], {"gpu-l40s": 1}),
    "a picture of FLUX with a LoRA": ([LORAS], {"gpu-l40s": 1}),
    "a burst of FLUX": ([FLUX] * 3, {"gpu-l40s": 3}),
    "a larger one": ([FLUX] * 8, {"gpu-l40s": 8}),
    "a video": ([VIDEO, ENCODER], {"gpu-h100": 1}),
    "many videos": ([VIDEO] * 4 + [ENCODER] * 5, {"gpu-h100": 4, "cpu": 1}),
    "an encoder": ([ENCODER], {}),
    "two encoders": ([ENCODER] * 2, {"cpu": 1}),
    "all at once": ([SDXL, FLUX, VIDEO, ENCODER], {"gpu-a10g": 1, "gpu-l40s": 1, "gpu-h100": 1}),
}
ON_GCP = {
    "nothing": ([], {}),
    "a picture of SDXL": ([SDXL], {"gpu-l4": 1}),
    "a picture of FLUX": ([FLUX], {"gpu-a100": 1}),
    "a burst of FLUX": ([FLUX] * 3, {"gpu-a100": 3}),
    "a video": ([VIDEO, ENCODER], {"gpu-a100": 1}),
    "two encoders": ([ENCODER] * 2, {"cpu": 1}),
    "all at once": ([SD15, FLUX, VIDEO, ENCODER], {"gpu-l4": 1, "gpu-a100": 2}),
}
TABLE = [
    pytest.param(cloud, asked, started, id=f"{cloud}: {name}")
    for cloud, rows in (("aws", ON_AWS), ("gcp", ON_GCP))
    for name, (asked, started) in rows.items()
]


def fleet_of(cloud: str, folder: Path) -> dict[str, Any]:
    """The Serve config that the cluster's own commands write on its head."""
    (command,) = CLUSTERS[cloud]["head_setup_commands"]
    here = command.replace("~/weft/fleet.yaml", str(folder / "fleet.yaml")).replace("~/weft", str(ROOT))
    here = re.sub(r"> fleet\.yaml$", f"> {folder}/fleet.yaml", here)
    subprocess.run(["sh", "-c", here], check=True)
    made: dict[str, Any] = yaml.safe_load((folder / "fleet.yaml").read_text(encoding="utf-8"))
    return made


def needs_of(application: Mapping[str, Any]) -> dict[str, Need]:
    """Of every deployment of the application, what one replica claims of a node."""
    overrides = {one["name"]: one for one in application.get("deployments", [])}
    module, _, name = application["import_path"].partition(":")
    builder = getattr(import_module(module), name)
    (parameter,) = inspect.signature(builder).parameters.values()
    built = build_app(builder(parameter.annotation.model_validate(application["args"])), name="any")
    needs = {}
    for deployment in built.deployments:
        options = overrides.get(deployment.name, {}).get("ray_actor_options", deployment.ray_actor_options)
        kind = options.get("accelerator_type")
        claimed = {
            "CPU": options.get("num_cpus", 1),
            "GPU": options.get("num_gpus", 0),
            **options.get("resources", {}),
            **({f"accelerator_type:{kind}": 0.001} if kind else {}),
        }
        needs[deployment.name] = {name: amount for name, amount in claimed.items() if amount}
    return needs


@pytest.fixture(scope="module")
def needs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Need]]:
    """By cloud and deployment, what one replica claims."""
    found: dict[str, dict[str, Need]] = {}
    for cloud in CLUSTERS:
        fleet = fleet_of(cloud, tmp_path_factory.mktemp(cloud))
        found[cloud] = {}
        for application in fleet["applications"]:
            found[cloud] |= needs_of(application)
    return found


def scheduled(cloud: str, demands: Sequence[Need], gangs: Sequence[Sequence[Need]] = ()) -> SchedulingReply:
    """What Ray's autoscaler does about these demands where only the head runs."""
    config = AutoscalingConfig(prepare_config(CLUSTERS[cloud]), skip_content_hash=True)
    head = Instance(instance_id="1", instance_type="head", status=Instance.ALLOCATED, node_kind=NodeKind.HEAD)
    pack = ResourceRequestUtil.PlacementConstraintType.AFFINITY
    packed = [
        [ResourceRequestUtil.make(need, [(pack, f"group{index}", "")]) for need in gang]
        for index, gang in enumerate(gangs)
    ]
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([*map(ResourceRequestUtil.make, demands)]),
        gang_resource_requests=[GangResourceRequest(requests=requests) for requests in packed],
        current_instances=[AutoscalerInstance(im_instance=head)],
    )
    return ResourceDemandScheduler().schedule(request)


def launched(reply: SchedulingReply) -> Counter[str]:
    assert not reply.infeasible_resource_requests
    assert not reply.infeasible_gang_resource_requests
    return Counter({one.instance_type: one.count for one in reply.to_launch})


@pytest.mark.parametrize(("cloud", "asked", "started"), TABLE)
def test_a_request_starts_the_smallest_node_that_serves_it_and_no_other(
    needs: dict[str, dict[str, Need]], cloud: str, asked: list[str], started: dict[str, int]
) -> None:
    demands = [needs[cloud][name] for name in [*GATEWAY, *asked]]

    assert launched(scheduled(cloud, demands)) == started


@pytest.mark.parametrize(("cloud", "node"), [("aws", "gpu-4"), ("gcp", "gpu-2")])
def test_a_gang_of_two_gets_one_node_of_several_gpus(cloud: str, node: str) -> None:
    gang = [{"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}]

    assert launched(scheduled(cloud, [], [gang])) == {node: 1}


@pytest.mark.parametrize("cloud", CLUSTERS)
def test_what_needs_no_gpu_asks_for_a_place_that_no_gpu_node_has(
    needs: dict[str, dict[str, Need]], cloud: str
) -> None:
    types = CLUSTERS[cloud]["available_node_types"].values()
    of_gpu_nodes = {name for kind in types if kind["resources"]["GPU"] for name in kind["resources"]}
    on_cpus = {name: need.keys() - of_gpu_nodes for name, need in needs[cloud].items() if "GPU" not in need}

    assert on_cpus == {
        "Ingress": {"front"},
        "Dispatcher": {"front"},
        "Adapters": {"front"},
        "VideoEncoder": {"encoder"},
    }


@pytest.mark.parametrize("cloud", CLUSTERS)
def test_every_model_of_the_fleet_has_a_node_type_with_one_gpu(
    needs: dict[str, dict[str, Need]], cloud: str
) -> None:
    on_gpus = {name: need for name, need in needs[cloud].items() if "GPU" in need}

    replies = {name: launched(scheduled(cloud, [need])) for name, need in on_gpus.items()}

    types = CLUSTERS[cloud]["available_node_types"]
    assert len(replies) >= 6
    assert {types[node]["resources"]["GPU"] for reply in replies.values() for node in reply} == {1}
