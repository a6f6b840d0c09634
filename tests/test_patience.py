"""Waits scale with the machine, so that a slow or busy one passes the tests."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.patience import VARIABLE, patience, slowness

TESTS = Path(__file__).parent
WAITS = {"wait", "wait_for", "timeout", "communicate", "result", "join", "wait_procs"}
LIMITS = {"timeout", "open_timeout", "within_s", "limit_s"}
CLOCKS = {"monotonic", "perf_counter"}


def test_patience_grows_with_the_slowness_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1.0")
    quiet_s = patience(2)
    monkeypatch.setenv(VARIABLE, "3.5")

    assert patience(2) == 3.5 * quiet_s


def test_slowness_is_measured_once_and_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)

    first = slowness()

    assert first >= 1
    assert slowness() == first


def test_no_wait_has_a_limit_of_its_own() -> None:
    """A number over a second in a wait fails on a slow machine; shorter ones are what a test is about."""
    found = []
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            values = [keyword.value for keyword in node.keywords if keyword.arg in LIMITS]
            values += node.args[-1:] if name in WAITS else []
            if any(isinstance(value, ast.Constant) and _seconds(value.value) > 1 for value in values):
                found.append(f"{path.relative_to(TESTS)}:{node.lineno}")

    assert found == []


def _seconds(value: object) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def test_no_test_asserts_a_time_on_the_clock() -> None:
    found = []
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Assert) or not isinstance(node.test, ast.Compare):
                continue
            calls = [part.func for part in ast.walk(node.test) if isinstance(part, ast.Call)]
            if any(isinstance(call, ast.Attribute) and call.attr in CLOCKS for call in calls):
                found.append(f"{path.relative_to(TESTS)}:{node.lineno}")

    assert found == []
