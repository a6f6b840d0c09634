"""Metrics, log lines and traces of the serving layer, without a Ray cluster."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.observability.declarations import SERVING_METRICS
from deployments.observability.ray_metrics import RayMeter
from deployments.protocol import log_context
from deployments.protocol.errors import ModelUnavailable
from deployments.protocol.log_context import LogContext
from serve_app.observability import tracing
from serve_app.observability.metrics import LocalMeter, Meters


def value(meter: LocalMeter, sample: str, **labels: str) -> float | None:
    return meter.registry.get_sample_value(sample, labels)


def test_every_declared_metric_takes_numbers_with_its_labels() -> None:
    meter = LocalMeter()
    for metric in SERVING_METRICS.values():
        labels = dict.fromkeys(metric.labels, "x")
        {"counter": meter.add, "gauge": meter.put, "histogram": meter.observe}[metric.kind](
            metric.name, 2.0, **labels
        )

    text = meter.text().decode()

    assert [name for name in SERVING_METRICS if name not in text] == []
    assert value(meter, "weft_jobs_queued", model="x") == 2.0


def test_an_undeclared_label_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"[Ll]abel"):
        LocalMeter().add("weft_jobs_submitted_total", model="x", prompt="a red fox")


def test_several_meters_get_the_same_values() -> None:
    first, second = LocalMeter(), LocalMeter()

    Meters((first, second, RayMeter())).add("weft_refusals_total", kind="rate_limited")

    assert value(first, "weft_refusals_total", kind="rate_limited") == 1.0
    assert value(second, "weft_refusals_total", kind="rate_limited") == 1.0


class Lines(logging.Handler):
    """Keeps records as they would be written."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class LikeRay(logging.Filter):
    """Ray and Serve write their own ids into every line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.job_id, record.request_id = "01000000", "of-serve"
        return True


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    handler.addFilter(LikeRay())
    log_context.add_context_filters([handler])
    logger = logging.getLogger("weft.test")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)


def ids(record: logging.LogRecord) -> tuple[object, object]:
    return record.__dict__.get("job_id"), record.__dict__.get("request_id")


async def test_lines_name_the_job_and_request_of_their_own_task(lines: Lines) -> None:
    logger = logging.getLogger("weft.test")

    async def work(name: str) -> None:
        log_context.bind(LogContext(f"job-{name}", f"request-{name}"))
        await asyncio.sleep(0)
        await asyncio.to_thread(logger.info, "in a thread")

    await asyncio.gather(work("a"), work("b"))

    assert sorted(ids(record) for record in lines.records) == [  # type: ignore[type-var]
        ("job-a", "request-a"),
        ("job-b", "request-b"),
    ]


def test_a_line_with_a_job_id_of_its_own_keeps_it_and_rays_job_id_is_dropped(lines: Lines) -> None:
    logger = logging.getLogger("weft.test")

    def log() -> None:
        logger.info("without a job")
        logger.info("of a job", extra={"job_id": "mine"})

    contextvars.Context().run(log)

    assert [ids(record) for record in lines.records] == [(None, "of-serve"), ("mine", "of-serve")]


def test_filters_are_added_once(lines: Lines) -> None:
    before = list(lines.filters)

    log_context.add_context_filters([lines])

    assert lines.filters == before


def test_tracing_without_a_destination_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*tracing.ENDPOINTS, tracing.TRACE_DIR):
        monkeypatch.delenv(name, raising=False)

    with pytest.raises(ModelUnavailable, match="OTEL_EXPORTER_OTLP_ENDPOINT"):
        tracing.exporters()


def test_without_a_trace_no_span_is_opened() -> None:
    assert tracing.current_traceparent() == ""

    with tracing.continue_trace("", "dispatch"):
        assert tracing.current_traceparent() == ""


def test_a_trace_goes_on_from_its_traceparent_and_lands_in_the_folder(tmp_path: Path) -> None:
    code = (
        "from opentelemetry import trace; from opentelemetry.sdk.trace import TracerProvider; "
        "from serve_app.observability import tracing; provider = TracerProvider(); "
        "[provider.add_span_processor(p) for p in tracing.exporters()]; trace.set_tracer_provider(provider)\n"
        f"with tracing.continue_trace('00-{'a' * 32}-{'b' * 16}-01', 'dispatch x'):\n"
        "    print(tracing.current_traceparent())"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        env={tracing.TRACE_DIR: str(tmp_path)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )

    (file,) = tmp_path.glob("spans-*.jsonl")
    (span,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert done.stdout.startswith(f"00-{'a' * 32}-")
    assert (span["name"], span["parent_id"]) == ("dispatch x", "0x" + "b" * 16)
    assert span["context"]["trace_id"] == "0x" + "a" * 32
