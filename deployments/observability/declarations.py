"""All metrics of Weft, of the serving layer and of the inference layer; no other module declares one.

No label is a prompt, a key, a user or an id: each has few values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0)
LONG_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """A declared metric."""

    name: str  # as exported at /metrics; Ray exports it as ray_<name>
    kind: Literal["counter", "gauge", "histogram"]
    description: str  # the HELP text
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper bounds; of a histogram only


def _counter(name: str, description: str, *labels: str) -> Metric:
    return Metric(name, "counter", description, labels)


def _gauge(name: str, description: str, *labels: str) -> Metric:
    return Metric(name, "gauge", description, labels)


def _histogram(name: str, description: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(name, "histogram", description, labels, buckets)


def _by_name(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


_HTTP_METRICS = (
    _counter("weft_http_requests_total", "HTTP requests answered.", "method", "route", "status"),
    _histogram(
        "weft_http_request_seconds",
        "Time from an HTTP request to the last byte of its answer; an event stream lasts as long as its job.",
        SECONDS,
        "route",
    ),
    _counter(
        "weft_refusals_total",
        "HTTP requests answered with an error, by its kind: rate_limited, overloaded, bad_request, ...",
        "kind",
    ),
)
_JOB_METRICS = (
    _counter("weft_jobs_submitted_total", "Jobs accepted.", "model", "task"),
    _counter(
        "weft_jobs_same_total",
        "Accepted jobs that did not run: files copied from an earlier job, or joined to a running one.",
        "model",
        "how",
    ),
    _histogram(
        "weft_job_submit_seconds", "Time from a parsed request to the durable record of its job.", SECONDS
    ),
    _counter(
        "weft_jobs_finished_observed_total",
        "Ends of jobs that were delivered to a client that waited or listened.",
        "state",
    ),
    _gauge("weft_jobs_queued", "Jobs waiting in the job store, as each dispatcher counts them.", "model"),
    _gauge("weft_jobs_running", "Jobs running on this dispatcher.", "model"),
    _gauge("weft_slots_free", "Further jobs that this dispatcher could send to a model.", "model"),
    _counter("weft_jobs_ended_total", "Jobs ended, by state and kind of error.", "model", "state", "error"),
    _counter(
        "weft_job_device_seconds_total", "Device seconds of ended jobs: their shares of forwards.", "model"
    ),
    _counter("weft_job_megapixels_total", "Megapixels of the files of ended jobs.", "model"),
    _counter("weft_job_cost_total", "Cost of ended jobs, by the prices of their models.", "model"),
    _counter(
        "weft_attempts_given_back_total",
        "Attempts whose job returned to the queue because its replica was draining or lost.",
        "model",
    ),
    _counter(
        "weft_leases_lost_total",
        "Jobs whose lease expired without a heartbeat of their worker, found by this dispatcher.",
        "model",
    ),
    _histogram(
        "weft_job_wait_seconds",
        "Time from the acceptance of a job to the start of its last attempt, of jobs that ran.",
        LONG_SECONDS,
        "model",
    ),
    _histogram(
        "weft_job_total_seconds",
        "Time from the acceptance of a job to its end, of completed jobs that ran.",
        LONG_SECONDS,
        "model",
    ),
)
_ENGINE_METRICS = (
    _gauge("weft_requests_running", "Requests that hold a slot of this replica."),
    _gauge("weft_requests_waiting", "Requests on this replica that wait for a slot."),
    _gauge("weft_slots", "Maximum number of requests that this replica runs at once."),
    _counter("weft_requests_total", "Requests ended on this replica, completed or not."),
    _counter(
        "weft_requests_failed_total",
        "Requests failed on this replica. not_finite: NaN in the result; out_of_memory: too large alone.",
        "kind",
    ),
    _counter(
        "weft_requests_handed_back_total",
        "Requests returned by this replica to the queue when it was stopped.",
    ),
    _counter("weft_steps_total", "Denoising steps finished, of all requests on this replica."),
    _counter(
        "weft_forwards_total",
        "Forward passes. size: side of the square with as many pixels, rounded up to 256; rows: batch size.",
        "model",
        "module",
        "size",
        "rows",
    ),
    _counter(
        "weft_forward_seconds_total",
        "Time spent in forward passes. size: side of the square with as many pixels; rows: batch size.",
        "model",
        "module",
        "size",
        "rows",
    ),
    _counter(
        "weft_batches_halved_total",
        "Batched forward passes that ran out of memory and were repeated in two halves.",
    ),
    _counter(
        "weft_device_failures_total",
        "Failures of the device that ended this replica: illegal accesses, uncorrectable errors, lost GPUs.",
    ),
    _gauge(
        "weft_batch_sizes",
        "Batch sizes tried or to be tried, over all shapes of a module. proven: they change no bit; refused: "
        "they do, or failed; pending: not tried.",
        "module",
        "state",
    ),
    _counter(
        "weft_forwards_unproven_total",
        "Forward passes that requests shared in a batch size not proven to change no bit.",
    ),
    _counter("weft_video_frames_decoded_total", "Video frames decoded from latents on this replica."),
    _counter(
        "weft_video_decode_seconds_total", "Time spent decoding video frames from latents on this replica."
    ),
)
_MODEL_METRICS = (
    _gauge("weft_model_bytes", "Size of the weights of a loaded model on the device.", "model"),
    _counter("weft_model_loads_total", "Loads of a model by this replica.", "model"),
    _counter("weft_model_load_seconds_total", "Time spent loading a model by this replica.", "model"),
    _counter(
        "weft_extras_evicted_total",
        "ControlNets, refiners and preprocessors of a model that were unloaded for others.",
        "model",
    ),
    _gauge(
        "weft_cold_start_seconds",
        "Duration of the phases of this replica's start: imports, load, warm_up.",
        "phase",
    ),
    _gauge(
        "weft_device_bytes",
        "Memory of the GPU: allocated and reserved by this replica, used by all processes, total.",
        "what",
    ),
    _gauge(
        "weft_memory_bytes",
        "Memory of the device as counted: weights, loras, stacks, prompts, requests, working, activations.",
        "part",
    ),
    _gauge(
        "weft_memory_limit_bytes", "Memory of the device that all parts of this replica may have together."
    ),
    _gauge("weft_host_bytes", "Resident memory of this replica's process."),
    _counter("weft_prompt_cache_hits_total", "Prompts whose embeddings were found in the cache.", "model"),
    _counter(
        "weft_prompt_cache_misses_total", "Prompts encoded because their embeddings were not cached.", "model"
    ),
    _gauge("weft_prompt_cache_bytes", "Size of the cached prompt embeddings.", "model"),
    _counter(
        "weft_adapter_uses_total",
        "LoRAs used by requests, by where they were found: device, memory, file.",
        "model",
        "level",
    ),
    _counter(
        "weft_adapters_evicted_total", "LoRAs removed from the device to make space for others.", "model"
    ),
    _gauge(
        "weft_adapters_held", "Number of LoRAs in the cache, on the device and in memory.", "model", "level"
    ),
    _gauge(
        "weft_adapter_bytes", "Size of the LoRAs in the cache, on the device and in memory.", "model", "level"
    ),
)
_ENCODER_METRICS = (
    _counter("weft_encoder_frames_total", "Video frames encoded by a VideoEncoder."),
    _counter(
        "weft_encoder_seconds_total", "Time spent encoding video, the sum over all workers of a VideoEncoder."
    ),
    _counter("weft_encoder_videos_total", "Video files joined from their segments by a VideoEncoder."),
)
_WEIGHTS_METRICS = (
    _gauge("weft_nodes_with_weights", "Nodes on which WeightsFetcher has downloaded all weights."),
    _gauge("weft_nodes_wanting_weights", "Nodes on which WeightsFetcher downloads weights, finished or not."),
)

SERVING_METRICS = _by_name(*_HTTP_METRICS, *_JOB_METRICS)
INFERENCE_METRICS = _by_name(*_ENGINE_METRICS, *_MODEL_METRICS, *_ENCODER_METRICS, *_WEIGHTS_METRICS)
METRICS = SERVING_METRICS | INFERENCE_METRICS
