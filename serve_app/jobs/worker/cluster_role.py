"""From which queues the dispatchers of one cluster may claim, while several clusters share the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from serve_app.jobs.store.clusters import choose_cluster
from serve_app.jobs.store.store import JobStore

UPDATE_EVERY_S = 1.0

logger = logging.getLogger(__name__)


class ClusterRole:
    """The part of one cluster in the work, as its dispatcher last read it from the store.

    Every queue has one cluster that claims its jobs and whose autoscaler sees them
    (`serve_app/jobs/store/clusters.py` says which). Jobs that run on another one end there.
    """

    def __init__(
        self, store: JobStore, cluster: str, *, release: str, place: str, is_ready: Callable[[], bool]
    ) -> None:
        """cluster: its id, the same for all dispatchers of one application on one Ray cluster.

        is_ready: whether everything that it serves runs; asked until it is true.
        """
        self.cluster = cluster
        self._store = store
        self._release = release
        self._place = place
        self._is_ready = is_ready
        self._ready = False
        self._left_to: dict[str, str | None] | None = None  # by queue, another cluster; None: unknown yet
        self._update_at = 0.0

    def may_claim(self, queue: str) -> bool:
        """Whether jobs of this queue are for this cluster."""
        return self._left_to is not None and queue not in self._left_to

    async def update(self, queues: Iterable[str]) -> None:
        """Every UPDATE_EVERY_S: report this cluster, and read which cluster claims from each queue."""
        now = time.monotonic()
        if now < self._update_at:
            return
        self._ready = self._ready or self._is_ready()
        await self._store.clusters.report(
            self.cluster, release=self._release, place=self._place, ready=self._ready
        )
        records = {record.id: record for record in await self._store.clusters.all()}
        serving = await self._store.throughput.clusters_of(list(queues))
        left_to: dict[str, str | None] = {}
        for queue, clusters in serving.items():
            known = [records[cluster] for cluster in clusters | {self.cluster} if cluster in records]
            chosen = choose_cluster(known)
            if chosen != self.cluster:
                left_to[queue] = chosen
        self._log_change(left_to)
        self._left_to = left_to
        self._update_at = now + UPDATE_EVERY_S

    def _log_change(self, left_to: dict[str, str | None]) -> None:
        before = self._left_to or {}
        for queue in left_to.keys() | before.keys():
            if left_to.get(queue, self.cluster) == before.get(queue, self.cluster):
                continue
            if queue not in left_to:
                logger.warning("this cluster claims the jobs of a queue again", extra={"queue": queue})
            else:
                logger.warning(
                    "this cluster claims no more jobs of a queue; those that run here end",
                    extra={"queue": queue, "claimed_by": left_to[queue] or "no cluster: all were stopped"},
                )
