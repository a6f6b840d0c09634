"""Exports spans, and carries the trace of a job through the job store.

Serve creates a span for every call of a deployment when the Serve config has a `tracing_config`; without one
the functions here do nothing. See docs/metrics.md.
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

TRACE_DIR = "WEFT_TRACE_DIR"  # as Settings.trace_dir, which proxies and the controller do not load
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

_propagator = TraceContextTextMapPropagator()


def current_traceparent() -> str:
    """The W3C traceparent of the current span; empty without one."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent", "")


@contextmanager
def continue_trace(traceparent: str, name: str) -> Iterator[None]:
    """Run the block in a span of that trace; does nothing when traceparent is empty."""
    if not traceparent:
        yield
        return
    parent = _propagator.extract({"traceparent": traceparent})
    with trace.get_tracer("weft").start_as_current_span(name, context=parent):
        yield


def exporters() -> list[SpanProcessor]:
    """Span processors for `exporter_import_path` of Serve's tracing_config.

    Spans go to an OTLP collector if OpenTelemetry's own variables name one, and to files in WEFT_TRACE_DIR if
    it is set, with one span per line and one file per process.

    Raises ModelUnavailable when neither is set, or OTLP's exporter is not installed.
    """
    processors: list[SpanProcessor] = []
    if any(os.environ.get(name) for name in ENDPOINTS):
        processors.append(_otlp())
    if folder := os.environ.get(TRACE_DIR):
        processors.append(_files(Path(folder)))
    if not processors:
        raise ModelUnavailable(
            f"tracing is on without a destination for spans: set {ENDPOINTS[1]} to a collector or "
            f"{TRACE_DIR} to a folder for every Ray process, or remove tracing_config from the Serve config"
        )
    return processors


def _otlp() -> SpanProcessor:
    # an optional dependency, which is not installed for development
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
    file = (folder / f"spans-{os.getpid()}.jsonl").open("a", encoding="utf-8")  # open as long as the process
    exporter = ConsoleSpanExporter(out=file, formatter=lambda span: span.to_json(indent=None) + "\n")
    return SimpleSpanProcessor(exporter)
