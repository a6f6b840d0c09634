"""The names of all keys and channels of the job store (pure)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


def key_digest(text: str) -> str:
    """32 hex digits: short, and safe in the name of a key whatever a caller sent."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Keys:
    """Every key and channel, under one prefix (the server's ACL allows no other)."""

    prefix: str

    def job(self, job_id: str) -> str:
        """HASH: the record of a job, the only source of truth about it."""
        return f"{self.prefix}job:{job_id}"

    def events(self, job_id: str) -> str:
        """STREAM: the events of a job, for replay."""
        return f"{self.prefix}events:{job_id}"

    @property
    def pending(self) -> str:
        """ZSET of all queued jobs by time of acceptance: bounds the queue."""
        return f"{self.prefix}pending"

    def pending_of(self, model: str) -> str:
        """ZSET of one model's queued jobs: dispatchers claim from it; the rank is the queue position."""
        return f"{self.prefix}pending:{model}"

    @property
    def running(self) -> str:
        """ZSET of jobs under a lease by its deadline: the reaper reads it."""
        return f"{self.prefix}running"

    def active(self, owner: str) -> str:
        """SET of an owner's queued and running jobs; absent when there are none."""
        return f"{self.prefix}active:{owner}"

    def owner(self, owner: str) -> str:
        """ZSET of an owner's jobs by time of acceptance: lists are read from it."""
        return f"{self.prefix}owner:{owner}"

    def fair_queue(self, model: str) -> str:
        """HASH: the queue's virtual time (field v) and the finish tag of each flow, see fair_queue.py."""
        return f"{self.prefix}fairqueue:{model}"

    @property
    def arrivals(self) -> str:
        """STRING: how many jobs were queued so far, of any model."""
        return f"{self.prefix}arrivals"

    def idempotency_key(self, owner: str, digest: str) -> str:
        """STRING: the first job with an owner's Idempotency-Key, and the digest of its body."""
        return f"{self.prefix}idempotency:{owner}:{digest}"

    def cache_key(self, cache_key: str) -> str:
        """STRING: the job that generates, or has generated, the files of all requests with this cache key."""
        return f"{self.prefix}cache:{cache_key}"

    def followers(self, job_id: str) -> str:
        """ZSET of jobs that wait for the files of this one, by time of acceptance."""
        return f"{self.prefix}followers:{job_id}"

    def epoch(self, owner: str) -> str:
        """STRING: how often an owner's cache was emptied."""
        return f"{self.prefix}epoch:{owner}"

    def quota(self, owner: str) -> str:
        """HASH: images by day, of an owner who has a quota."""
        return f"{self.prefix}quota:{owner}"

    def usage(self, day: str) -> str:
        """HASH: what the jobs that ended on a UTC day used, by account and amount, see usage.py."""
        return f"{self.prefix}usage:{day}"

    def cost(self, owner: str) -> str:
        """HASH: what an owner's jobs cost, by month, in millionths."""
        return f"{self.prefix}cost:{owner}"

    def durations(self, model: str) -> str:
        """LIST: seconds that the latest jobs of a model took."""
        return f"{self.prefix}durations:{model}"

    def capacity(self, model: str) -> str:
        """HASH: per dispatcher its slots of a model, how many are free, and when it reported them."""
        return f"{self.prefix}capacity:{model}"

    def cluster(self, cluster: str) -> str:
        """HASH: what is known of a Ray cluster that uses this store, see clusters.py."""
        return f"{self.prefix}cluster:{cluster}"

    @property
    def clusters(self) -> str:
        """ZSET of these clusters by when one of their dispatchers last reported."""
        return f"{self.prefix}clusters"

    @property
    def expiring(self) -> str:
        """ZSET of ended jobs whose files still exist, by when they are removed."""
        return f"{self.prefix}expiring"

    @property
    def outbox(self) -> str:
        """ZSET of ended jobs whose webhook is not delivered yet, by the time of the next try."""
        return f"{self.prefix}outbox"

    def maintenance_lock(self, name: str) -> str:
        """STRING: exists while one process has this maintenance task."""
        return f"{self.prefix}maintenance:{name}"

    @property
    def secret(self) -> str:
        """STRING: the installation's secret, for cache keys, link signatures and webhook secrets."""
        return f"{self.prefix}secret"

    @property
    def work_channel(self) -> str:
        """Wake-ups for dispatchers: new work, or the cancellation of a running job."""
        return f"{self.prefix}wakeups:work"

    @property
    def events_channel(self) -> str:
        """Wake-ups for followers: a job has a new event."""
        return f"{self.prefix}wakeups:events"
