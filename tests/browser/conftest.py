"""A real headless Chromium on the page; a test fails on any console error and any call to another host."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.fake_backend import FakeBackend
from tests.patience import patience

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MUST_RUN = bool(os.environ.get("CI_BROWSER"))


def _missing(what: str) -> None:
    if MUST_RUN:
        pytest.fail(f"CI_BROWSER is set, but {what}")
    pytest.skip(f"{what}; browser tests need it")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One browser for all tests of a file. Not for the session: playwright keeps an event loop in this
    thread until it is stopped, and tests elsewhere run loops of their own.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("the Python package playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        _missing("there is no chromium on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)  # a fresh profile each time
        yield browser
        browser.close()


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    fake = FakeBackend()
    yield fake
    fake.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a backend: open_page(backend, width=1360, ...), `ready=False` where it cannot
    come to Generate. Checks at the end that all was quiet."""
    contexts, faults = [], []

    def open_page(
        backend: FakeBackend, width: int = 1360, height: int = 860, ready: bool = True, **options: Any
    ) -> Any:
        context = chromium.new_context(
            viewport={"width": width, "height": height}, reduced_motion="reduce", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1_000 * patience())
        page.expected_errors = []  # parts of console lines that a test causes on purpose
        page.on("pageerror", lambda error: faults.append(f"page error: {error}"))
        page.on(
            "console",
            lambda line: (
                line.type in ("error", "warning")
                and not any(part in line.text for part in page.expected_errors)
                and faults.append(f"console {line.type}: {line.text}")
            ),
        )
        page.on("request", lambda request: _is_ours(request.url) or faults.append(f"called {request.url}"))
        page.goto(backend.url)
        if ready:
            page.locator("#generate:enabled").wait_for()  # the models are known
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def _is_ours(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:"))


@pytest.fixture
def keep_picture() -> Callable[[Any, str], None]:
    """Saves a screenshot for manual review, when WEFT_SCREENSHOTS names a folder."""
    folder = os.environ.get("WEFT_SCREENSHOTS")

    def keep(page: Any, name: str) -> None:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=f"{folder}/{name}.png")

    return keep
