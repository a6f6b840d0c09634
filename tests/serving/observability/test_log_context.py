"""Log lines of a replica carry the ids of their job and request, over the ids that Ray writes."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Iterator

import pytest

from deployments.protocol import log_context
from deployments.protocol.log_context import LogContext


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


def test_text_of_a_caller_neither_ends_a_line_nor_steers_a_terminal(lines: Lines) -> None:
    logger = logging.getLogger("weft.test")

    logger.warning("no model %s", "x\nERROR forged\x1b[2J\0\u202e", extra={"error": "a\r\nb", "count": 3})
    logger.warning("plain %d%%", 7)

    forged, plain = lines.records
    assert forged.getMessage() == "no model x\\u000aERROR forged\\u001b[2J\\u0000\\u202e"
    assert (forged.__dict__["error"], forged.__dict__["count"]) == ("a\\u000d\\u000ab", 3)
    assert plain.getMessage() == "plain 7%"
