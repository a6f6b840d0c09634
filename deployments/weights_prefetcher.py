"""WeightsPrefetcher: downloads the weights of models to the GPU nodes before a replica needs them."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deployments.models.weight_cache import fetch, use_installation
from deployments.observability.metrics import Reporter, Sample
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import Internal, ModelUnavailable
from deployments.protocol.installation import AS_THE_NODE_SAYS, Installation
from deployments.protocol.log_context import join_serve_log

POLL_S = 5.0  # interval at which the nodes are listed
RETRY_S = 60.0  # from a failed download to the next attempt on the node

logger = logging.getLogger(__name__)


class WeightsPrefetcher:
    """Runs a download task on every node with GPUs, or on all nodes where none has; also on later nodes.

    A replica that starts meanwhile waits for the same files and downloads nothing twice.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it, so that the task below runs in its loop
        self,
        cards: Sequence[ModelCard],
        installation: Installation = AS_THE_NODE_SAYS,
        poll_s: float = POLL_S,
    ) -> None:
        """cards: models whose weights are downloaded, in this order. installation: how they are reached."""
        join_serve_log("deployments")
        self._cards = list(cards)
        self._installation = installation
        self._poll_s = poll_s
        self._states: dict[str, str] = {}  # by node id, see status
        self._retry_at: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._reporter = Reporter()
        # a task with the context of a Serve request would be cancelled with that request
        self._watching = asyncio.create_task(self._run(), context=contextvars.Context())

    async def status(self) -> Mapping[str, str]:
        """By node id: "fetching", "ready", or the error of the last attempt."""
        return dict(self._states)

    def check_health(self) -> None:
        """Called by Serve; raising has the replica replaced."""
        if self._watching.done():
            raise Internal("the task that lists the nodes has ended")

    async def _run(self) -> None:
        while True:
            try:
                self._start_downloads(await asyncio.to_thread(ray.nodes))
            except (ray.exceptions.RayError, OSError) as error:
                logger.warning("nodes could not be listed", extra={"error": repr(error)})
            await asyncio.sleep(self._poll_s)

    def _start_downloads(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        targets = target_nodes(nodes)
        for removed in self._states.keys() - set(targets):
            del self._states[removed]
        for node in targets:
            state = self._states.get(node)
            may_retry = time.monotonic() >= self._retry_at.get(node, 0.0)
            if state is None or (state not in ("fetching", "ready") and may_retry):
                self._states[node] = "fetching"
                task = asyncio.create_task(self._fetch_on(node))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        ready = sum(state == "ready" for state in self._states.values())
        self._reporter.report(
            [Sample("weft_nodes_with_weights", ready), Sample("weft_nodes_wanting_weights", len(targets))]
        )

    async def _fetch_on(self, node: str) -> None:
        on_node = NodeAffinitySchedulingStrategy(node, soft=False)
        task = _fetch_all.options(num_cpus=0, scheduling_strategy=on_node, max_retries=0)
        try:
            await task.remote(self._cards, self._installation)
        except ray.exceptions.RayError as error:
            reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            self._states[node] = reason
            self._retry_at[node] = time.monotonic() + RETRY_S
            logger.warning("download of weights failed", extra={"node": node, "error": reason})
        else:
            self._states[node] = "ready"
            logger.info("weights are complete on a node", extra={"node": node})


def target_nodes(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ids of the nodes that need weights, from the result of ray.nodes()."""
    alive = [node for node in nodes if node["Alive"]]
    with_gpus = [node for node in alive if node["Resources"].get("GPU", 0) > 0]
    return [str(node["NodeID"]) for node in with_gpus or alive]


@ray.remote
def _fetch_all(cards: Sequence[ModelCard], installation: Installation) -> None:
    """Runs on the node. Raises ModelUnavailable with all errors, after everything was tried."""
    from deployments.models.load_errors import explain  # imports torch

    use_installation(installation)
    failed: list[str] = []
    for card in cards:
        for weights in card.all_weights:
            try:
                fetch(weights, pipeline=weights == card.weights)
            except Exception as error:
                failed.append(str(explain(error, weights, card.licence)))
    if failed:
        raise ModelUnavailable("; ".join(failed))
