"""Videos of the task dialect."""

from __future__ import annotations

import httpx
import pytest

from serve_app.api.state import ApiState
from tests.serving.api.calls import ended
from tests.serving.api.fake_video_model import BODY, VIDEO, FakeVideoModel


@pytest.fixture
def state(video_state: ApiState) -> ApiState:
    return video_state


async def test_the_task_dialect_makes_videos_too(
    client: httpx.AsyncClient, fake_video_model: FakeVideoModel
) -> None:
    answer = await client.post("/generate-video", json=BODY)
    task_id = answer.json()["task_id"]
    await ended(client, task_id)

    result = await client.get(f"/task/{task_id}/result")
    file = await client.get(f"/task/{task_id}/result", headers={"Accept": "video/mp4"})

    assert answer.status_code == 202
    assert result.json()["images"][0]["kind"] == "video"
    assert (file.headers["content-type"], file.content) == ("video/mp4", VIDEO)
