"""Where spans are exported to, and how a trace continues after the job store."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.protocol.errors import ModelUnavailable
from serve_app.observability import tracing


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
