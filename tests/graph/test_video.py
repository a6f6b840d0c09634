"""Videos through the whole graph: the model films, the encoder on CPUs encodes, and either may die."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.graph.calls import ended
from tests.graph.running import PATIENCE_S, Service, kill
from tests.inference.video_files import DecodedVideo, decibels, decode_video

pytestmark = pytest.mark.ray

REQUEST = {"model": "tiny-wan", "prompt": "a red circle moving left", "seed": 3, "steps": 2, "num_frames": 65}
SAME_FRAMES_DB = 33.0  # two encodings of the same frames


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> Iterator[DecodedVideo]:
    """The video that the openai SDK orders, waits for and downloads."""
    with openai.OpenAI(api_key="none", base_url=f"{service.url}/v1", timeout=PATIENCE_S) as sdk:
        extra = {"seed": "3", "num_inference_steps": "2", "num_frames": "65"}
        video = sdk.videos.create_and_poll(
            prompt=str(REQUEST["prompt"]), model="tiny-wan", size="64x64", extra_body=extra
        )
        assert video.status == "completed", video.error
        yield decode_video(sdk.videos.download_content(video.id).content)


def begun(client: httpx.Client, **changes: Any) -> str:
    """A job that has finished denoising: its frames are being decoded and encoded."""
    answer = client.post("/api/generate/video", json=REQUEST | changes)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    with client.stream("GET", f"/api/generate/{job_id}/events") as events:
        assert any(line == "event: stage" for line in events.iter_lines())
    return job_id


def video_of(client: httpx.Client, job_id: str) -> DecodedVideo:
    job = ended(client, job_id)
    assert job["status"] == "completed", job["error"]
    (video,) = job["artifacts"]
    return decode_video(client.get(video["url"]).content)


@pytest.mark.parametrize(("victim", "fps"), [("VideoEncoder", 11), ("tiny-wan", 12)])
def test_a_video_survives_kill_9_in_its_middle(
    victim: str, fps: int, undisturbed: DecodedVideo, service: Service, client: httpx.Client
) -> None:
    job_id = begun(client, fps=fps)  # another pace: the same request would be answered from the cache

    kill(service.pid_of(victim))

    shown = video_of(client, job_id)
    assert shown.frames.shape == undisturbed.frames.shape == (65, 64, 64, 3)
    pairs = zip(shown.frames, undisturbed.frames, strict=True)
    assert min(decibels(a, b) for a, b in pairs) > SAME_FRAMES_DB
    assert shown.duration_s == pytest.approx(65 / fps, abs=0.02)
    assert (shown.pixel_format, shown.colours) == ("yuv420p", (1, 1, 1, 1))
