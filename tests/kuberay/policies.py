"""Whether Kubernetes' network policies let one end of a connection reach another.

As the documentation of NetworkPolicy says: a pod that some policy selects for a direction admits what one of
these policies allows, and any other pod admits everything; both ends of a connection must admit it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Manifest = Mapping[str, Any]
NAMESPACE_LABEL = "kubernetes.io/metadata.name"


@dataclass(frozen=True)
class End:
    """One end of a connection: a pod, or an address outside of the cluster."""

    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str = ""


def admits(policies: Iterable[Manifest], source: End, target: End, port: int, protocol: str = "TCP") -> bool:
    """Whether the connection is possible. policies: all of namespace "weft"."""
    policies = list(policies)
    return _end_admits(policies, source, target, port, protocol, "Egress") and _end_admits(
        policies, target, source, port, protocol, "Ingress"
    )


def _end_admits(
    policies: list[Manifest],
    own: End,
    other: End,
    port: int,
    protocol: str,
    direction: Literal["Ingress", "Egress"],
) -> bool:
    if own.namespace != "weft":
        return True
    specs = [policy["spec"] for policy in policies]
    chosen = [
        spec
        for spec in specs
        if direction in spec["policyTypes"] and _matches(spec["podSelector"], own.labels)
    ]
    key = "from" if direction == "Ingress" else "to"
    rules = [rule for spec in chosen for rule in spec.get(direction.lower(), [])]
    return not chosen or any(
        _rule_admits(rule.get(key), rule.get("ports"), other, port, protocol) for rule in rules
    )


def _rule_admits(
    peers: list[Manifest] | None, ports: list[Manifest] | None, other: End, port: int, protocol: str
) -> bool:
    return (peers is None or any(_is_peer(peer, other) for peer in peers)) and (
        ports is None
        or any(one.get("port") in (None, port) and one.get("protocol", "TCP") == protocol for one in ports)
    )


def _is_peer(peer: Manifest, other: End) -> bool:
    if "ipBlock" in peer:
        return bool(other.address) and _is_in_block(ipaddress.ip_address(other.address), peer["ipBlock"])
    if other.address:
        return False
    if "namespaceSelector" in peer:
        is_in_namespace = _matches(peer["namespaceSelector"], {NAMESPACE_LABEL: other.namespace})
    else:
        is_in_namespace = other.namespace == "weft"
    return is_in_namespace and _matches(peer.get("podSelector", {}), other.labels)


def _is_in_block(address: ipaddress.IPv4Address | ipaddress.IPv6Address, block: Manifest) -> bool:
    excluded = any(address in ipaddress.ip_network(one) for one in block.get("except", []))
    return address in ipaddress.ip_network(block["cidr"]) and not excluded


def _matches(selector: Manifest, labels: Mapping[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, "the evaluator knows matchLabels only"
    return selector.get("matchLabels", {}).items() <= labels.items()
