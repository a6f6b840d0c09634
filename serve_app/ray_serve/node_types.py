"""The nodes that Ray's autoscaler may start, read in a file for `ray up` or a manifest of KubeRay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from serve_app.ray_serve.private_api import node_types_of_ray_cluster


def read_node_types(path: Path) -> dict[str, dict[str, float]]:
    """By name, the resources of each node type. Raises OSError, and ValueError for another file."""
    text = path.read_text(encoding="utf-8")
    try:
        found: dict[str, dict[str, float]] = {}
        for document in yaml.safe_load_all(text):
            if isinstance(document, dict):
                found |= _of_document(document)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is neither a file for ray up nor a manifest of KubeRay: {error!r}"
        ) from None
    if not found:
        raise ValueError(f"{path} has no node types: it is no file for ray up and no manifest of KubeRay")
    return found


def _of_document(document: dict[str, Any]) -> dict[str, dict[str, float]]:
    if "available_node_types" in document:
        types = document["available_node_types"]
    elif document.get("kind") == "RayService":
        types = node_types_of_ray_cluster(document["spec"]["rayClusterConfig"])
    elif document.get("kind") == "RayCluster":
        types = node_types_of_ray_cluster(document["spec"])
    else:
        return {}
    return {name: dict(kind.get("resources") or {}) for name, kind in types.items()}
