"""`weft doctor --cluster`: asks every node of a running Ray cluster, and Serve what it runs there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from deployments.protocol.errors import BadRequest
from serve_app.cli.cluster_findings import cluster_findings
from serve_app.cli.findings import Finding
from serve_app.ray_serve.cluster_probe import connected, probe_cluster
from serve_app.ray_serve.node_types import read_node_types


def examine_cluster(address: str | None, node_types: Path | None) -> Iterator[Finding]:
    """All findings of the cluster at this address; None: RAY_ADDRESS, or that of this machine.

    node_types: a file with the nodes that the autoscaler may start; None: as the head's autoscaler has it.
    Raises BadRequest for a file that cannot be read, RuntimeError when there is no cluster.
    """
    types = None
    if node_types is not None:
        try:
            types = read_node_types(node_types)
        except (OSError, ValueError) as error:
            raise BadRequest(f"--node-types: {error}") from None
    with connected(address or os.environ.get("RAY_ADDRESS") or "auto") as dashboard:
        facts = probe_cluster(dashboard)
    yield from cluster_findings(facts, types)
