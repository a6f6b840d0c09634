"""What `weft doctor --cluster` finds in the answers of a cluster's nodes (pure)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from serve_app.cli.findings import Finding, Level, about
from serve_app.ray_serve.cluster_probe import ClusterFacts, ProbedNode
from serve_app.ray_serve.node_probe import NodeFacts
from serve_app.redis.info import RedisInfo

CLOCKS_WARN_S, CLOCKS_FAIL_S = 1.0, 5.0  # between two nodes
NodeTypes = Mapping[str, Mapping[str, float]]


def cluster_findings(cluster: ClusterFacts, node_types: NodeTypes | None = None) -> Iterator[Finding]:
    """All findings. node_types: resources by name, from a file; None: as the head's autoscaler has them."""
    known = [
        (node, node.facts) for node in cluster.nodes if node.facts is not None and not node.facts.settings
    ]
    yield from about("nodes", _reachable(cluster.nodes))
    yield from about("versions", _versions(cluster.nodes))
    yield from about("token", _token(cluster))
    yield from about("job store", _each(known, "the job store can be used", lambda facts: facts.store))
    yield from about("clocks", _clocks(known))
    yield from about("storage", _storage(cluster, known))
    yield from about("Ray's store", _store_of_ray([facts for node, facts in known if node.is_head]))
    yield from about("folders", _folders(known))
    yield from about("GPUs", _gpus(known))
    yield from about("notices", _notices(known))
    yield from about("metrics", _metrics(cluster.nodes))
    yield from about("node types", _places(cluster, node_types))


def _each(
    known: Sequence[tuple[ProbedNode, NodeFacts]], what: str, failure: Callable[[NodeFacts], str]
) -> Iterator[Finding]:
    """One failure for each node that has one; else one finding for all."""
    failed = [(node, text) for node, facts in known if (text := failure(facts))]
    for node, text in failed:
        yield Finding(Level.fail, f"{node.name}: {text}")
    if known and not failed:
        yield Finding(Level.ok, f"{what} on {_nodes(len(known))}")


def _nodes(count: int) -> str:
    return "the only node" if count == 1 else f"all {count} nodes"


def _reachable(nodes: Sequence[ProbedNode]) -> Iterator[Finding]:
    failed = False
    for node in nodes:
        if reason := node.failure or (node.facts.settings if node.facts is not None else ""):
            failed = True
            cure = "correct its environment" if node.facts else "see the logs of its raylet, or end the node"
            yield Finding(Level.fail, f"{node.name} cannot run what is checked: {reason}; {cure}")
    if not failed:
        yield Finding(Level.ok, f"a task runs on {_nodes(len(nodes))}")


def _versions(nodes: Sequence[ProbedNode]) -> Iterator[Finding]:
    asked = [(node, node.facts.versions) for node in nodes if node.facts is not None]
    same = True
    for package in dict.fromkeys(name for _, versions in asked for name in versions):
        found = Counter(versions.get(package, "none") for _, versions in asked)
        if len(found) > 1:
            same = False
            usual = found.most_common(1)[0][0]
            others = [
                f"{versions.get(package, 'none')} on {node.name}"
                for node, versions in asked
                if versions.get(package, "none") != usual
            ]
            yield Finding(
                Level.fail,
                f"{package} is {usual}, but {', '.join(others)}; install one everywhere",
            )
    if asked and same:
        text = ", ".join(f"{package} {found}" for package, found in asked[0][1].items())
        yield Finding(Level.ok, f"the same versions on {_nodes(len(asked))}: {text}")


def _token(cluster: ClusterFacts) -> Iterator[Finding]:
    without = [node.name for node in cluster.nodes if node.facts is not None and node.facts.token != "token"]
    if without:
        yield Finding(
            Level.fail,
            f"Ray asks for no token on {', '.join(without)}: who reaches its ports runs code there; "
            "set RAY_AUTH_MODE=token for every Ray process",
        )
    elif cluster.dashboard_status is None:
        yield Finding(Level.warn, "the dashboard does not answer: serve deploy and serve status need it")
    elif cluster.dashboard_status != 401:
        yield Finding(
            Level.fail,
            f"the dashboard answers {cluster.dashboard_status} to a call without a token; start the "
            "head with RAY_AUTH_MODE=token",
        )
    else:
        yield Finding(Level.ok, "every node of Ray, and its dashboard, asks for a token")


def _clocks(known: Sequence[tuple[ProbedNode, NodeFacts]]) -> Iterator[Finding]:
    """Nodes are compared by the job store's clock."""
    ahead = {node.name: -facts.clock_ahead_s for node, facts in known if facts.clock_ahead_s is not None}
    if not ahead:
        return
    first, last = min(ahead, key=ahead.__getitem__), max(ahead, key=ahead.__getitem__)
    apart_s, of_store_s = ahead[last] - ahead[first], max(ahead.values(), key=abs)
    if max(apart_s, abs(of_store_s)) <= CLOCKS_WARN_S:
        yield Finding(Level.ok, f"the clocks of the job store and of {_nodes(len(ahead))} agree")
        return
    level = Level.fail if max(apart_s, abs(of_store_s)) > CLOCKS_FAIL_S else Level.warn
    if apart_s > CLOCKS_WARN_S:
        yield Finding(
            level, f"the clocks of {last} and {first} are {apart_s:.1f} s apart; run a time service on each"
        )
    else:
        yield Finding(
            level,
            f"the job store's clock is {abs(of_store_s):.1f} s from those of the nodes; run a time "
            "service there",
        )


def _storage(cluster: ClusterFacts, known: Sequence[tuple[ProbedNode, NodeFacts]]) -> Iterator[Finding]:
    cure = "correct WEFT_RESULTS_URL or S3_BUCKET_NAME, the keys or the role, or the mount"
    for node, facts in known:
        if facts.storage:
            yield Finding(Level.fail, f"{node.name} cannot store a result ({facts.storage}); {cure}")
    for node, _ in known:
        if node.unread:
            yield Finding(
                Level.fail,
                f"{node.name} does not see the results that {', '.join(node.unread)} stored: they are on a "
                "disk of one node; set WEFT_RESULTS_URL or S3_BUCKET_NAME, or mount one folder on all",
            )
    if cluster.unremoved:
        yield Finding(Level.fail, f"a stored result cannot be removed ({cluster.unremoved}); allow it")
    elif known and not any(facts.storage or node.unread for node, facts in known):
        yield Finding(Level.ok, f"results are stored, read and removed on {_nodes(len(known))}")


def _store_of_ray(heads: Iterable[NodeFacts]) -> Iterator[Finding]:
    for facts in heads:
        if facts.store_of_ray_failure:
            yield Finding(
                Level.fail, f"the Redis of RAY_REDIS_ADDRESS does not answer ({facts.store_of_ray_failure})"
            )
        elif facts.store_of_ray is None:
            yield Finding(
                Level.warn,
                "the head keeps its state in memory: a crash of it ends every replica; set RAY_REDIS_ADDRESS",
            )
        else:
            yield _permissions(facts.store_of_ray)
            yield from _keeping(facts.store_of_ray)
        if facts.store_is_shared:
            yield Finding(
                Level.warn, "jobs and Ray's state are in one Redis, and each may fill it; give each its own"
            )


def _permissions(info: RedisInfo) -> Finding:
    allowed = [
        name
        for name, is_allowed in (("read keys of others", info.foreign_keys), ("reconfigure it", info.admin))
        if is_allowed
    ]
    if allowed:
        return Finding(
            Level.warn,
            f"Ray's account of its Redis may {' and '.join(allowed)}; give it the ACL of docs/security.md",
        )
    return Finding(Level.ok, "Ray's account of its Redis may use Ray's keys and nothing else")


def _keeping(info: RedisInfo) -> Iterator[Finding]:
    if info.eviction not in (None, "noeviction"):
        yield Finding(
            Level.fail, f"Ray's Redis may drop keys (maxmemory-policy {info.eviction}); set noeviction"
        )
    if info.aof is False:
        yield Finding(Level.warn, "Ray's Redis writes nothing to disk: its restart ends every replica")


def _folders(known: Sequence[tuple[ProbedNode, NodeFacts]]) -> Iterator[Finding]:
    def unwritable(facts: NodeFacts) -> str:
        if not facts.folders:
            return ""
        listed = ", ".join(f"{folder} ({reason})" for folder, reason in facts.folders.items())
        return f"cannot write to {listed}; set HF_HOME, WEFT_MODEL_CACHE or WEFT_DATA_DIR, or mend the mount"

    yield from _each(known, "the folders of weights, compiled code and LoRAs can be written", unwritable)


def _gpus(known: Sequence[tuple[ProbedNode, NodeFacts]]) -> Iterator[Finding]:
    counted = 0
    failed = False
    for node, facts in known:
        wanted = int(node.resources.get("GPU", 0))
        counted += wanted
        if wanted > len(facts.gpus) and not facts.gpus_are_logical:
            failed = True
            reason = facts.gpu_failure or "the others are hidden from this process"
            yield Finding(
                Level.fail,
                f"{node.name} counts {wanted} GPUs, and torch computes on {len(facts.gpus)}: {reason}",
            )
    if not failed:
        logical = any(facts.gpus_are_logical for _, facts in known)
        text = " (WEFT_LOGICAL_GPUS is set: they need not be there)" if logical and counted else ""
        yield Finding(Level.ok, f"torch computes on each of the {counted} GPUs that Ray counts{text}")


def _notices(known: Sequence[tuple[ProbedNode, NodeFacts]]) -> Iterator[Finding]:
    """Whether a replica on each node learns that the cloud takes the node back."""
    asked = [(node, facts) for node, facts in known if facts.metadata_url]
    silent = [node.name for node, facts in asked if not facts.metadata_answers]
    if silent:
        yield Finding(
            Level.warn,
            f"the metadata service of WEFT_METADATA_URL does not answer on {', '.join(silent)}: notices of "
            "spot nodes are not seen there; open its address, or unset the variable where there are none",
        )
    if without := [node.name for node, facts in known if not facts.metadata_url and asked]:
        yield Finding(
            Level.warn, f"WEFT_METADATA_URL is set, but not on {', '.join(without)}; set it on every node"
        )
    elif asked and not silent:
        yield Finding(Level.ok, f"notices of the cloud can be read on {_nodes(len(asked))}")


def _metrics(nodes: Sequence[ProbedNode]) -> Iterator[Finding]:
    failed = [node for node in nodes if node.metrics]
    for node in failed:
        yield Finding(Level.warn, f"{node.name}: {node.metrics}; open the port for Prometheus")
    if not failed:
        yield Finding(Level.ok, f"metrics can be read of {_nodes(len(nodes))}")


def _places(cluster: ClusterFacts, node_types: NodeTypes | None) -> Iterator[Finding]:
    """Whether every deployment fits a node that there is or that the autoscaler may start."""
    if not cluster.serves:
        yield Finding(Level.warn, "Serve runs nothing on this cluster; serve deploy a config")
        return
    types = node_types
    if types is None:
        types = next((n.facts.node_types for n in cluster.nodes if n.facts and n.facts.node_types), None)
    places = [node.resources for node in cluster.nodes] + [dict(kind) for kind in (types or {}).values()]
    homeless = [one for one in cluster.demands if not any(_fits(one.resources, place) for place in places)]
    for demand in homeless:
        wanted = ", ".join(f"{name}: {amount:g}" for name, amount in demand.resources.items())
        if types is None:
            text = "no node has that now; with an autoscaler on Kubernetes give its manifest as --node-types"
            yield Finding(Level.warn, f"{demand.deployment} of {demand.application} wants {wanted}: {text}")
        else:
            text = "no node and no node type has that, so it can never start; add a type, or change its card"
            yield Finding(Level.fail, f"{demand.deployment} of {demand.application} wants {wanted}: {text}")
    if not homeless:
        yield Finding(Level.ok, f"each of the {len(cluster.demands)} deployments fits a node or a node type")


def _fits(wanted: Mapping[str, float], place: Mapping[str, float]) -> bool:
    return all(place.get(name, 0) >= amount for name, amount in wanted.items())
