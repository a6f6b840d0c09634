"""The id of the Ray cluster that this process is in, and where an operator finds it."""

from __future__ import annotations

import os
import secrets

import ray

from serve_app.ray_serve.private_api import CLUSTER_NAME_VARIABLE, get_value, put_value

NAMESPACE = b"weft"  # in Ray's key-value store
KEY = b"cluster"
TIMEOUT_S = 10.0


def cluster_identity() -> tuple[str, str]:
    """(id, place) of this Ray cluster. Blocks for two calls to Ray's head node.

    The id lives as long as the state of the head: it survives a restart of a head that keeps its state, and
    another cluster has another. The place is KubeRay's name of the cluster, or the address of its head.
    """
    put_value(KEY, secrets.token_hex(4).encode(), NAMESPACE, overwrite=False)
    kept = get_value(KEY, NAMESPACE, TIMEOUT_S)
    assert kept is not None, "it was stored just now"
    place = os.environ.get(CLUSTER_NAME_VARIABLE) or ray.get_runtime_context().gcs_address
    return kept.decode(), place
