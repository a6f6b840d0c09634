"""`weft doctor --cluster` on real Ray clusters: one in order, and one whose nodes have faults."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.graph.clusters import RayCluster
from tests.graph.running import ROOT

pytestmark = pytest.mark.ray

CLOCK_60_S_AHEAD = """
import time
_time = time.time
time.time = lambda: _time() + 60.0
"""


def findings(cluster: RayCluster, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and findings of the command on the head."""
    run = cluster.weft("doctor", "--cluster", "--json", *options)
    assert run.stdout, run.stderr
    report = json.loads(run.stdout)
    found: list[dict[str, Any]] = report["findings"]
    assert report["checks"] == len(found)
    assert report["failed"] == sum(finding["level"] == "fail" for finding in found)
    return run.returncode, found


def texts(found: list[dict[str, Any]], level: str, check: str) -> str:
    return "\n".join(one["text"] for one in found if (one["level"], one["check"]) == (level, check))


def short(node_id: str) -> str:
    """A part of the name of this node in findings; it works in patterns, too."""
    return node_id[:8]


def test_a_cluster_in_order_has_no_failure_but_the_token_that_tests_go_without(
    ray_cluster: RayCluster,
) -> None:
    status, found = findings(ray_cluster)

    assert status == 1
    assert {one["check"] for one in found if one["level"] == "fail"} == {"token"}, found
    count = len(ray_cluster.nodes())
    assert f"a task runs on all {count} nodes" in texts(found, "ok", "nodes")
    assert "the same versions on all" in texts(found, "ok", "versions")
    assert "agree" in texts(found, "ok", "clocks")
    assert "stored, read and removed" in texts(found, "ok", "storage")
    assert "can be read of all" in texts(found, "ok", "metrics")
    assert "deployments fits a node" in texts(found, "ok", "node types")
    assert "can be written" in texts(found, "ok", "folders")
    assert "need not be there" in texts(found, "ok", "GPUs")
    assert "read keys of others" in texts(found, "warn", "Ray's store")  # one without users


def test_each_fault_of_a_node_is_found_and_named_with_the_node(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder, fake = tmp_path_factory.mktemp("doctor"), tmp_path_factory.mktemp("fake")
    (fake / "sitecustomize.py").write_text(CLOCK_60_S_AHEAD)
    (fake / "torch-9.9.9.dist-info").mkdir()
    (fake / "torch-9.9.9.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n"
    )
    with RayCluster(folder) as cluster:
        (head,) = cluster.nodes()
        cluster.add_worker("first", REDIS_URL="redis://127.0.0.1:1/0", WEFT_DATA_DIR=str(fake / "own"))
        (first,) = {*cluster.nodes()} - {head}
        cluster.add_worker(
            "second",
            PYTHONPATH=f"{fake}:{ROOT}",
            HF_HOME="/dev/null/hub",
            WEFT_LOGICAL_GPUS="false",
            WEFT_METADATA_URL="http://127.0.0.1:1",
        )
        (second,) = {*cluster.nodes()} - {head, first}
        cluster.add_worker("third", WEFT_LEASE_S="no number")
        nodes = cluster.nodes()

        status, found = findings(cluster)

    (third,) = {*nodes} - {head, first, second}
    assert status == 1
    failed = {one["check"] for one in found if one["level"] == "fail"}
    assert failed == {"nodes", "versions", "token", "job store", "clocks", "storage", "folders", "GPUs"}
    text = {check: texts(found, "fail", check) for check in failed}
    assert f"({short(third)}) cannot run what is checked: WEFT_LEASE_S" in text["nodes"]
    assert re.search(rf"torch is \S+, but 9.9.9 on \S+ \({short(second)}\);", text["versions"])
    assert f"({short(first)}): no Redis can be reached" in text["job store"]
    assert re.search(rf"the clocks of \S+ \({short(second)}\) and .* are [56]\d\.\d s apart", text["clocks"])
    assert f"({short(first)}) does not see the results" in text["storage"]
    assert f"({short(second)}): cannot write to /dev/null/hub" in text["folders"]
    assert f"({short(second)}) counts 1 GPUs, and torch computes on 0" in text["GPUs"]
    assert short(second) in texts(found, "warn", "notices")
    assert "Serve runs nothing" in texts(found, "warn", "node types")


def test_without_a_cluster_it_says_where_to_run(tmp_path: Path, ray_cluster: RayCluster) -> None:
    run = ray_cluster.weft("doctor", "--cluster", "--node-types", str(tmp_path / "none.yaml"))

    assert run.returncode == 1
    assert "--node-types" in run.stderr
