"""What this floor counts, and where its log lines go in a replica: into Serve's log file, with their job."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from deployments.protocol.log_context import add_context_filters

REPORT_INTERVAL_S = 2.0  # Ray's agent collects less often than that

logger = logging.getLogger(__name__)


def join_serve_log() -> None:
    """Send what `deployments` logs to the handlers Serve gave this replica (JSON, replica, ids).

    Without it Python's root logger would drop everything below WARNING.
    """
    ours, serves = logging.getLogger("deployments"), logging.getLogger("ray.serve")
    add_context_filters(serves.handlers)
    ours.handlers, ours.propagate = serves.handlers, False
    ours.setLevel(serves.level)


@dataclass(frozen=True, slots=True)
class ReplicaMetric:
    """One declared metric. No label is ever a prompt, a user or an id: their values are few."""

    name: str  # Ray exports it as ray_<name>, counters with a _total
    kind: Literal["counter", "gauge"]
    description: str
    labels: tuple[str, ...] = ()


_FORWARD = ("model", "module", "size", "rows")
METRICS = {
    metric.name: metric
    for metric in (
        ReplicaMetric("weft_requests_running", "gauge", "Requests that hold a slot of this replica."),
        ReplicaMetric("weft_requests_waiting", "gauge", "Requests on this replica that wait for a slot."),
        ReplicaMetric("weft_slots", "gauge", "Requests that this replica runs at once."),
        ReplicaMetric("weft_requests", "counter", "Requests that ended here, however."),
        ReplicaMetric(
            "weft_requests_failed",
            "counter",
            "Of these, failed. not_finite: the model gave NaN; out_of_memory: it did not fit alone.",
            ("kind",),
        ),
        ReplicaMetric(
            "weft_requests_handed_back",
            "counter",
            "Requests that a stopping replica gave to others.",
        ),
        ReplicaMetric("weft_steps", "counter", "Denoising steps finished, of all requests."),
        ReplicaMetric(
            "weft_forwards",
            "counter",
            "Forwards run. size: side of the square with as many pixels, rounded up to 256.",
            _FORWARD,
        ),
        ReplicaMetric("weft_forward_seconds", "counter", "What these forwards took, together.", _FORWARD),
        ReplicaMetric(
            "weft_batches_halved",
            "counter",
            "Joint forwards that ran out of memory and ran in halves.",
        ),
        ReplicaMetric("weft_video_frames_decoded", "counter", "Frames that the decoder of videos gave."),
        ReplicaMetric("weft_video_decode_seconds", "counter", "What it took."),
        ReplicaMetric("weft_model_bytes", "gauge", "Weights of a loaded model on the device.", ("model",)),
        ReplicaMetric("weft_model_loads", "counter", "Times that this replica loaded a model.", ("model",)),
        ReplicaMetric("weft_model_load_seconds", "counter", "What these took, together.", ("model",)),
        ReplicaMetric(
            "weft_cold_start_seconds",
            "gauge",
            "Phases of this replica's start: imports, load, warm_up.",
            ("phase",),
        ),
        ReplicaMetric(
            "weft_device_bytes",
            "gauge",
            "The GPU's memory: allocated and reserved by this replica, used by all, total. None on a CPU.",
            ("what",),
        ),
        ReplicaMetric("weft_host_bytes", "gauge", "Resident memory of this replica."),
        ReplicaMetric(
            "weft_prompts_cached", "counter", "Prompts whose embeddings were remembered.", ("model",)
        ),
        ReplicaMetric("weft_prompts_encoded", "counter", "Prompts that were encoded.", ("model",)),
        ReplicaMetric("weft_prompt_cache_bytes", "gauge", "Remembered embeddings.", ("model",)),
        ReplicaMetric(
            "weft_adapter_uses",
            "counter",
            "LoRAs that requests asked for, by where they were: device, memory, file.",
            ("model", "level"),
        ),
        ReplicaMetric(
            "weft_adapters_evicted", "counter", "LoRAs that left the device for others.", ("model",)
        ),
        ReplicaMetric(
            "weft_adapters_held", "gauge", "LoRAs on the device and in memory.", ("model", "level")
        ),
        ReplicaMetric("weft_adapter_bytes", "gauge", "What they take.", ("model", "level")),
        ReplicaMetric("weft_encoder_frames", "counter", "Frames that a VideoEncoder encoded."),
        ReplicaMetric("weft_encoder_seconds", "counter", "What it took, of all its workers."),
        ReplicaMetric("weft_encoder_videos", "counter", "Videos whose segments it joined."),
        ReplicaMetric("weft_nodes_with_weights", "gauge", "Nodes on which WeightsFetcher has all weights."),
        ReplicaMetric("weft_nodes_wanting_weights", "gauge", "Nodes on which it shall have them."),
    )
}


class Sample(NamedTuple):
    """The value of a metric now: of a counter, all of it so far."""

    name: str
    value: float
    labels: dict[str, str] = {}


class Reporter:
    """Hands numbers to Ray, whose agent on this node exports them as ray_weft_... with the replica's
    deployment and id. Nobody who works waits for it: a thread of its own asks for readings."""

    def __init__(self, interval_s: float = REPORT_INTERVAL_S) -> None:
        from ray.serve import metrics

        self._serve_metrics: Any = metrics  # whose annotations allow one label only
        self._made: dict[str, Any] = {}
        self._reported: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._stopped = threading.Event()
        self._interval_s = interval_s

    def start(self, read: Callable[[], Iterable[Sample]]) -> None:
        """Tell what `read` gives, every 2 s, until `stop`. It is called in a thread."""
        thread = threading.Thread(target=self._run, args=(read,), name="telemetry", daemon=True)
        thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def report(self, samples: Iterable[Sample]) -> None:
        """Hand these over."""
        for name, value, labels in samples:
            metric = METRICS[name]
            made = self._made.get(name)
            if made is None:
                kind = self._serve_metrics.Counter if metric.kind == "counter" else self._serve_metrics.Gauge
                made = self._made[name] = kind(name, metric.description, tag_keys=metric.labels)
            if metric.kind == "gauge":
                made.set(value, dict(labels))
                continue
            key = (name, tuple(sorted(labels.items())))
            more = value - self._reported.get(key, 0.0)
            if more > 0:  # Ray's counters take no zero
                made.inc(more, dict(labels))
                self._reported[key] = value

    def _run(self, read: Callable[[], Iterable[Sample]]) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                self.report(read())
            except Exception:  # the outermost loop of this thread: numbers must not end a replica
                logger.exception("numbers of this replica could not be told; the next ones may")
