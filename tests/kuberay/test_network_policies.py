"""Who reaches whom in the cluster of configs/kuberay, and who does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.kuberay.policies import End, admits

FOLDER = Path(__file__).parents[2] / "configs/kuberay"
POLICIES = list(yaml.safe_load_all((FOLDER / "network-policies.yaml").read_text(encoding="utf-8")))
PART = {"app.kubernetes.io/part-of": "weft"}
NODE = PART | {"app.kubernetes.io/component": "ray"}
RAY = End("weft", NODE | {"ray.io/group": "gpu-24gb"})
FRONT = End("weft", NODE | {"ray.io/group": "front"})
VALKEY = End("weft", PART | {"app.kubernetes.io/name": "valkey"})
VALKEY_OF_RAY = End("weft", PART | {"app.kubernetes.io/name": "valkey-ray"})
OTHER = End("weft", {"app": "other"})
OPERATOR, GATEWAY = End("kuberay-system"), End("envoy-gateway-system")
PROMETHEUS, STRANGER, DNS = End("monitoring"), End("default"), End("kube-system")
NODE_DNS, CLOUD_DNS = End(address="169.254.20.10"), End(address="169.254.169.254")
HUB, API = End(address="18.164.174.17"), End(address="10.96.0.1")

REACHED = [
    (RAY, RAY, 6379),
    (RAY, RAY, 10_017),
    (RAY, VALKEY, 6379),
    (OPERATOR, RAY, 8265),
    (OPERATOR, RAY, 8000),
    (GATEWAY, FRONT, 8000),
    (FRONT, RAY, 10_018),
    (RAY, VALKEY_OF_RAY, 6379),
    (FRONT, VALKEY, 6379),
    (PROMETHEUS, RAY, 8080),
    (PROMETHEUS, RAY, 44217),
    (PROMETHEUS, RAY, 44227),
    (RAY, PROMETHEUS, 4317),  # a collector beside it
    (RAY, PROMETHEUS, 4318),
    (RAY, HUB, 443),
    (RAY, API, 6443),
    (RAY, DNS, 53),
    (RAY, NODE_DNS, 53),
    (RAY, CLOUD_DNS, 53),
]
NOT_REACHED = [
    (STRANGER, RAY, 8000),
    (STRANGER, RAY, 8265),
    (STRANGER, FRONT, 8000),
    (GATEWAY, RAY, 8000),  # callers reach front nodes only
    (GATEWAY, FRONT, 8265),
    (GATEWAY, FRONT, 6379),
    (GATEWAY, VALKEY, 6379),
    (STRANGER, RAY, 44217),
    (OTHER, VALKEY_OF_RAY, 6379),
    (PROMETHEUS, RAY, 8265),
    (STRANGER, VALKEY, 6379),
    (OTHER, VALKEY, 6379),
    (OTHER, HUB, 443),
    (RAY, CLOUD_DNS, 80),  # where clouds hand out the credentials of a node
    (RAY, NODE_DNS, 80),
    (RAY, HUB, 22),
]


@pytest.mark.parametrize(("source", "target", "port"), REACHED)
def test_what_has_to_be_reached_is(source: End, target: End, port: int) -> None:
    assert admits(POLICIES, source, target, port)


@pytest.mark.parametrize(("source", "target", "port"), NOT_REACHED)
def test_what_must_not_be_reached_is_not(source: End, target: End, port: int) -> None:
    assert not admits(POLICIES, source, target, port)


@pytest.mark.parametrize("server", [DNS, NODE_DNS, CLOUD_DNS])
def test_names_are_resolved_by_datagrams_too(server: End) -> None:
    assert admits(POLICIES, RAY, server, 53, "UDP")
