"""A warning that a replica finds while it runs a job is in the answer of every dialect."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from deployments.protocol.adjustment import Adjustment
from tests.serving.api.calls import ended, submitted
from tests.serving.api.fake_model import FakeModel
from tests.serving.api.test_job_events import events_of

CUT = Adjustment("prompt_truncated", "prompt", "the end was not read", of_result=True)
SHOWN = {"code": CUT.code, "param": CUT.param, "message": CUT.message}
BODY = {"model": "sketch", "prompt": "a red fox"}


@pytest.fixture(autouse=True)
def _found(fake_model: FakeModel) -> None:
    fake_model.warnings = (CUT,)


async def test_the_job_its_last_event_and_the_result_of_its_task_show_it(client: httpx.AsyncClient) -> None:
    job_id = await submitted(client)

    events = events_of((await client.get(f"/api/generate/{job_id}/events")).text)
    job = await ended(client, job_id)
    result = (await client.get(f"/task/{job_id}/result")).json()

    for answer in (events[-1]["data"]["job"], job, result):
        assert answer["warnings"] == [SHOWN]


@pytest.mark.parametrize("stream", [False, True])
async def test_openais_answer_shows_it(stream: bool, client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/images/generations", json=BODY | {"stream": stream})

    body: dict[str, Any] = events_of(answer.text)[-1]["data"] if stream else answer.json()
    assert body["warnings"] == [SHOWN]
