"""WeightsFetcher: has the weights of cards on every GPU node before a replica needs them."""

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

from deployments.observability.metrics import Reporter, Sample, join_serve_log
from deployments.protocol.card import ModelCard
from deployments.protocol.errors import Internal

POLL_S = 5.0  # between two looks at which nodes there are
RETRY_S = 60.0  # after a fetch that failed

logger = logging.getLogger(__name__)


class WeightsPrefetcher:
    """Sends a task to every node that has GPUs, or to all where none has; nodes that come later get theirs.

    A replica that starts meanwhile waits for the same files and fetches nothing twice.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it, so that the loop below is the replica's
        self, cards: Sequence[ModelCard], poll_s: float = POLL_S
    ) -> None:
        """cards: all those whose weights shall be there, the most wanted first."""
        join_serve_log()
        self._cards = list(cards)
        self._poll_s = poll_s
        self._states: dict[str, str] = {}  # by node: fetching, ready, or why not
        self._retry_at: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._reporter = Reporter()
        # a task with the context of a Serve request would be cancelled with that request
        self._loop = asyncio.create_task(self._run(), context=contextvars.Context())

    async def status(self) -> Mapping[str, str]:
        """By node id: "fetching", "ready", or why the weights are not there."""
        return dict(self._states)

    def check_health(self) -> None:
        """Called by Serve; raising has the replica replaced."""
        if self._loop.done():
            raise Internal("the weights fetcher's loop has ended")

    async def _run(self) -> None:
        while True:
            try:
                self._poll(await asyncio.to_thread(ray.nodes))
            except (ray.exceptions.RayError, OSError) as error:
                logger.warning("the nodes are not to be had", extra={"error": repr(error)})
            await asyncio.sleep(self._poll_s)

    def _poll(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        wanted = target_nodes(nodes)
        for gone in self._states.keys() - set(wanted):
            del self._states[gone]
        for node in wanted:
            state = self._states.get(node)
            late = time.monotonic() >= self._retry_at.get(node, 0.0)
            if state is None or (state not in ("fetching", "ready") and late):
                self._states[node] = "fetching"
                task = asyncio.create_task(self._fetch_on(node))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        ready = sum(state == "ready" for state in self._states.values())
        self._reporter.report(
            [Sample("weft_nodes_with_weights", ready), Sample("weft_nodes_wanting_weights", len(wanted))]
        )

    async def _fetch_on(self, node: str) -> None:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        fetching = _fetch_all.options(num_cpus=0, scheduling_strategy=there, max_retries=0)
        try:
            await fetching.remote(self._cards)
        except ray.exceptions.RayError as error:
            reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            self._states[node] = reason
            self._retry_at[node] = time.monotonic() + RETRY_S
            logger.warning("weights were not fetched", extra={"node": node, "error": reason})
        else:
            self._states[node] = "ready"
            logger.info("weights are on a node", extra={"node": node})


def target_nodes(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ids of the nodes that shall have weights, of what ray.nodes() tells."""
    alive = [node for node in nodes if node["Alive"]]
    with_gpus = [node for node in alive if node["Resources"].get("GPU", 0) > 0]
    return [str(node["NodeID"]) for node in with_gpus or alive]


@ray.remote
def _fetch_all(cards: Sequence[ModelCard]) -> None:
    """On the node. Raises ModelUnavailable with the first reason, after all were tried."""
    from deployments.models import weight_cache
    from deployments.protocol.errors import ModelUnavailable

    failed: list[str] = []
    for card in cards:
        for weights in card.all_weights:
            try:
                weight_cache.fetch(weights, pipeline=weights == card.weights)
            except ModelUnavailable as error:
                failed.append(error.message)
    if failed:
        raise ModelUnavailable("; ".join(failed))
