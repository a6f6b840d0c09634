"""The task dialect: a task id, then status and result."""

import httpx

from deployments.protocol.events import Failed
from tests.serving.api.calls import ended, submitted
from tests.serving.api.fake_model import FakeModel


async def test_the_task_dialect_gives_status_and_result(client: httpx.AsyncClient, fake_model: FakeModel):
    answer = await client.post("/generate-image", json={"prompt": "a red fox"})
    assert answer.status_code == 202
    task_id = answer.json()["task_id"]
    await ended(client, task_id)

    status = (await client.get(f"/task/{task_id}/status")).json()
    result = (await client.get(f"/task/{task_id}/result")).json()
    picture = await client.get(f"/task/{task_id}/result", headers={"accept": "image/*"})

    assert (status["status"], status["progress"], status["error"]) == ("completed", 100, None)
    assert result["images"][0]["url"] == f"/api/results/{task_id}/0.png"
    assert picture.content == (await client.get(result["images"][0]["url"])).content
    assert task_id in picture.headers["content-disposition"]


async def test_a_result_that_is_not_there_yet_is_a_conflict_naming_where_to_ask(client: httpx.AsyncClient):
    task_id = (await client.post("/generate-image", json={"prompt": "a red fox"})).json()["task_id"]

    answer = await client.get(f"/task/{task_id}/result")

    assert answer.status_code == 409
    assert f"/task/{task_id}/status" in answer.json()["error"]["message"]


async def test_a_temporary_failure_carries_retry_after(client: httpx.AsyncClient, fake_model: FakeModel):
    fake_model.failure = Failed("overloaded", "all brushes are out", retryable=False, retry_after_s=7.2)
    job_id = await submitted(client)
    await ended(client, job_id)

    answer = await client.get(f"/task/{job_id}/result")

    assert answer.status_code == 503
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("8", "7200")
