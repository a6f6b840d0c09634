"""What `weft doctor --cluster` says of the answers of nodes, one fault at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.cli.cluster_findings import cluster_findings
from serve_app.cli.findings import Finding, Level, as_json, as_text
from serve_app.cli.main import main
from serve_app.ray_serve.cluster_probe import ClusterFacts, DeploymentDemand, ProbedNode
from serve_app.ray_serve.node_probe import NodeFacts
from serve_app.ray_serve.node_types import read_node_types
from serve_app.redis.info import RedisInfo

ROOT = Path(__file__).parents[3]
SAFE = RedisInfo("9.1", True, "always", "noeviction", True, False, False, 0.0)
FACTS = NodeFacts(
    token="token",
    versions={"ray": "2.60.0", "weft": "0.1.0 (code 12345678)"},
    clock_ahead_s=0.01,
    metadata_url="http://169.254.169.254",
    metadata_answers=True,
)
HEAD = ProbedNode("a" * 56, "10.0.0.1", True, {"CPU": 8.0, "front": 100.0}, replace(FACTS, store_of_ray=SAFE))
WORKER = ProbedNode(
    "b" * 56,
    "10.0.0.2",
    False,
    {"CPU": 16.0, "GPU": 1.0, "accelerator_type:L4": 1.0},
    replace(FACTS, gpus=("NVIDIA L4",)),
)
DEMANDS = [
    DeploymentDemand("weft", "Ingress", {"CPU": 1.0, "front": 1.0}),
    DeploymentDemand("model-sdxl", "sdxl", {"GPU": 1.0, "accelerator_type:L4": 0.001}),
]
CLUSTER = ClusterFacts([HEAD, WORKER], DEMANDS, serves=True, dashboard_status=401)
H100 = DeploymentDemand("model-video", "video", {"GPU": 1.0, "accelerator_type:H100": 0.001})


def worker(**facts: Any) -> ClusterFacts:
    """The cluster, with other answers of the worker."""
    assert WORKER.facts is not None
    return replace(CLUSTER, nodes=[HEAD, replace(WORKER, facts=replace(WORKER.facts, **facts))])


def head(**facts: Any) -> ClusterFacts:
    assert HEAD.facts is not None
    return replace(CLUSTER, nodes=[replace(HEAD, facts=replace(HEAD.facts, **facts)), WORKER])


def node(**changes: Any) -> ClusterFacts:
    return replace(CLUSTER, nodes=[HEAD, replace(WORKER, **changes)])


def bad(cluster: ClusterFacts, **types: Any) -> list[Finding]:
    return [finding for finding in cluster_findings(cluster, **types) if finding.level is not Level.ok]


def test_a_cluster_in_order_has_one_good_finding_for_each_check() -> None:
    found = [*cluster_findings(CLUSTER)]

    assert {finding.level for finding in found} == {Level.ok}
    assert len({finding.check for finding in found}) == len(found) == 12


@pytest.mark.parametrize(
    ("cluster", "level", "check", "words"),
    [
        (lambda: node(facts=None, failure="killed"), Level.fail, "nodes", "10.0.0.2 (bbbbbbbb) cannot run"),
        (lambda: worker(settings="WEFT_PORT is wrong"), Level.fail, "nodes", "correct its environment"),
        (
            lambda: worker(versions={"ray": "2.59.0", "weft": "0.1.0 (code 12345678)"}),
            Level.fail,
            "versions",
            "ray is 2.60.0, but 2.59.0 on 10.0.0.2 (bbbbbbbb)",
        ),
        (lambda: worker(token=""), Level.fail, "token", "no token on 10.0.0.2"),
        (lambda: replace(CLUSTER, dashboard_status=200), Level.fail, "token", "answers 200"),
        (lambda: replace(CLUSTER, dashboard_status=None), Level.warn, "token", "does not answer"),
        (lambda: worker(store="no Redis can be reached"), Level.fail, "job store", "10.0.0.2 (bbbbbbbb): no"),
        (lambda: worker(clock_ahead_s=2.0), Level.warn, "clocks", "are 2.0 s apart"),
        (lambda: worker(clock_ahead_s=-60.0), Level.fail, "clocks", "are 60.0 s apart"),
        (lambda: worker(storage="Forbidden"), Level.fail, "storage", "cannot store a result (Forbidden)"),
        (lambda: node(unread=("10.0.0.1",)), Level.fail, "storage", "does not see the results that 10.0.0.1"),
        (lambda: replace(CLUSTER, unremoved="denied"), Level.fail, "storage", "cannot be removed (denied)"),
        (lambda: head(store_of_ray=None), Level.warn, "Ray's store", "set RAY_REDIS_ADDRESS"),
        (lambda: head(store_of_ray_failure="refused"), Level.fail, "Ray's store", "(refused)"),
        (lambda: head(store_is_shared=True), Level.warn, "Ray's store", "give each its own"),
        (
            lambda: head(store_of_ray=replace(SAFE, foreign_keys=True, admin=True)),
            Level.warn,
            "Ray's store",
            "read keys of others and reconfigure it",
        ),
        (
            lambda: head(store_of_ray=replace(SAFE, eviction="allkeys-lru")),
            Level.fail,
            "Ray's store",
            "set noeviction",
        ),
        (lambda: head(store_of_ray=replace(SAFE, aof=False)), Level.warn, "Ray's store", "nothing to disk"),
        (lambda: worker(folders={"/models": "Read-only"}), Level.fail, "folders", "/models (Read-only)"),
        (lambda: worker(gpus=(), gpu_failure="no driver"), Level.fail, "GPUs", "computes on 0: no driver"),
        (lambda: worker(metadata_answers=False), Level.warn, "notices", "does not answer on 10.0.0.2"),
        (lambda: worker(metadata_url=""), Level.warn, "notices", "is set, but not on 10.0.0.2"),
        (lambda: node(metrics="http://... does not answer"), Level.warn, "metrics", "open the port"),
        (lambda: replace(CLUSTER, serves=False), Level.warn, "node types", "Serve runs nothing"),
        (lambda: replace(CLUSTER, demands=[H100]), Level.warn, "node types", "no node has that now"),
    ],
)
def test_each_fault_is_one_finding_that_says_what_to_do(
    cluster: Callable[[], ClusterFacts], level: Level, check: str, words: str
) -> None:
    (finding,) = bad(cluster())

    assert (finding.level, finding.check) == (level, check)
    assert words in finding.text


def test_a_model_that_no_node_type_can_take_can_never_start() -> None:
    missing = replace(CLUSTER, demands=[*DEMANDS, H100])
    aws = read_node_types(ROOT / "cluster.yaml")
    google = read_node_types(ROOT / "configs/clusters/gcp.yaml")

    assert bad(missing, node_types=aws) == []
    (finding,) = bad(missing, node_types=google)
    assert (finding.level, finding.check) == (Level.fail, "node types")
    assert "video of model-video wants GPU: 1, accelerator_type:H100: 0.001" in finding.text
    (known_by_the_head,) = bad(replace(missing, nodes=head(node_types=google).nodes))
    assert known_by_the_head == finding


def test_node_types_are_read_of_a_manifest_of_kuberay_too(tmp_path: Path) -> None:
    types = read_node_types(ROOT / "configs/kuberay/rayservice.yaml")
    other = tmp_path / "other.yaml"
    other.write_text("kind: ConfigMap")

    assert types["gpu-24gb"] == {"CPU": 8, "GPU": 1, "accelerator_type:24GB": 1} | {
        name: types["gpu-24gb"][name] for name in types["gpu-24gb"] if "memory" in name or "node" in name
    }
    assert types["front"]["front"] == 100
    with pytest.raises(ValueError, match="has no node types"):
        read_node_types(other)


def test_findings_are_printed_as_text_and_as_json() -> None:
    found = [
        Finding(Level.fail, "no", "clocks"),
        Finding(Level.warn, "hm", "token"),
        Finding(Level.ok, "yes"),
    ]

    assert as_text(found).splitlines() == [
        "fail  no",
        "warn  hm",
        "ok    yes",
        "3 checks: 1 failed, 1 with a warning",
    ]
    assert json.loads(as_json(found)) == {
        "checks": 3,
        "failed": 1,
        "warned": 1,
        "findings": [
            {"level": "fail", "text": "no", "check": "clocks"},
            {"level": "warn", "text": "hm", "check": "token"},
            {"level": "ok", "text": "yes", "check": ""},
        ],
    }


def test_without_a_cluster_the_command_says_where_to_run_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")

    status = main(["doctor", "--cluster", "--address", "no-address"])

    assert status == 1
    assert "no Ray cluster can be reached at no-address" in capsys.readouterr().err
