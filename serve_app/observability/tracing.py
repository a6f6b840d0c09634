"""Traces: where spans go, and how a job's trace gets over the queue. Spans themselves are mostly Serve's.

Serve makes a span for every call of a deployment when `tracing_config` in the Serve config says so; without
it everything here does nothing. See docs/metrics.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deployments.protocol.errors import ModelUnavailable

TRACE_DIR = "WEFT_TRACE_DIR"  # Settings.trace_dir; proxies and the controller have no Settings
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

_propagator = TraceContextTextMapPropagator()


def current_traceparent() -> str:
    """The W3C traceparent of the span we are in; empty where there is none."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent", "")


@contextmanager
def continue_trace(traceparent: str, name: str) -> Iterator[None]:
    """A span of that trace around the block; what is called inside belongs to it. Nothing without a trace."""
    if not traceparent:
        yield
        return
    parent = _propagator.extract({"traceparent": traceparent})
    with trace.get_tracer("weft").start_as_current_span(name, context=parent):
        yield


def exporters() -> list[SpanProcessor]:
    """For `exporter_import_path` of Serve's tracing_config: to an OTLP collector where one is named by
    OpenTelemetry's own variables, and to files in WEFT_TRACE_DIR, one span a line, one file a process.

    Raises ModelUnavailable when neither is set, or OTLP's exporter is not installed.
    """
    processors: list[SpanProcessor] = []
    if any(os.environ.get(name) for name in ENDPOINTS):
        processors.append(_otlp())
    if folder := os.environ.get(TRACE_DIR):
        processors.append(_files(Path(folder)))
    if not processors:
        raise ModelUnavailable(
            f"tracing is on and its spans have nowhere to go: set {ENDPOINTS[1]} to a collector or "
            f"{TRACE_DIR} to a folder for every Ray process, or take tracing_config out of the Serve config"
        )
    return processors


def _otlp() -> SpanProcessor:
    # an extra of its own, which is not installed here
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # type: ignore[import-not-found]
            OTLPSpanExporter,
        )
    except ImportError as error:
        raise ModelUnavailable(
            "spans cannot be sent to a collector: pip install opentelemetry-exporter-otlp-proto-http, on "
            "every node"
        ) from error
    return BatchSpanProcessor(OTLPSpanExporter())


def _files(folder: Path) -> SpanProcessor:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"spans-{os.getpid()}.jsonl").open("a", encoding="utf-8")  # for the process's life
    exporter = ConsoleSpanExporter(out=file, formatter=lambda span: span.to_json(indent=None) + "\n")
    return SimpleSpanProcessor(exporter)
