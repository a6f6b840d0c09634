"""Files as the whole service gives them out carry manifests that its own certificate signs."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import httpx
import pytest

from deployments.provenance.manifest import EDITED, GENERATED
from deployments.provenance.verifying import verify
from serve_app.signing import TEST_CERTIFICATES
from tests.graph.calls import ended, submit

pytestmark = pytest.mark.ray

SMALL = {"width": 64, "height": 64, "prompt": "a red circle"}
VIDEO = {"model": "tiny-wan", "prompt": "a red circle moving left", "steps": 1, "num_frames": 5, "seed": 1}


@pytest.fixture
def anchors() -> str:
    return (Path(os.environ["WEFT_DATA_DIR"]) / TEST_CERTIFICATES).read_text()


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_a_picture_and_its_thumbnail_are_signed(
    output_format: str, client: httpx.Client, anchors: str
) -> None:
    job = ended(client, submit(client, output_format=output_format, **SMALL))

    (shown,) = job["artifacts"]
    for url in (shown["url"], shown["thumbnail_url"]):
        answer = client.get(url)
        found = verify(answer.content, answer.headers["content-type"], anchors)
        assert (found.state, found.digital_source_type) == ("trusted", GENERATED)
        assert found.generation["model"] == "tiny-flux-schnell"


def test_an_edit_names_the_signed_picture_that_it_starts_from(client: httpx.Client, anchors: str) -> None:
    first = ended(client, submit(client, **SMALL))["artifacts"][0]
    given = base64.b64encode(client.get(first["url"]).content).decode()

    job = ended(client, submit(client, image=given, strength=0.8, **SMALL))

    found = verify(client.get(job["artifacts"][0]["url"]).content, "image/png", anchors)
    assert (found.state, found.digital_source_type) == ("trusted", EDITED)
    assert found.ingredients[0]["active_manifest"]


def test_openais_dialect_gives_the_signed_file(client: httpx.Client, anchors: str) -> None:
    body = {"model": "tiny-flux-schnell", "prompt": "a red circle", "size": "64x64"}

    answer = client.post("/v1/images/generations", json=body | {"response_format": "b64_json"})

    picture = base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert verify(picture, "image/png", anchors).state == "trusted"


@pytest.mark.parametrize(("container", "is_signed"), [("mp4", True), ("webm", False)])
def test_an_mp4_video_is_signed_and_a_webm_video_warns(
    container: str, is_signed: bool, client: httpx.Client, anchors: str
) -> None:
    answer = client.post("/api/generate/video", json=VIDEO | {"output_format": container})
    job = ended(client, answer.json()["id"])

    (video,) = job["artifacts"]
    warned = any(warning["code"] == "not_signed" for warning in job["warnings"])
    assert warned is not is_signed
    if is_signed:
        found = verify(client.get(video["url"]).content, "video/mp4", anchors)
        assert (found.state, found.digital_source_type) == ("trusted", GENERATED)
    poster = client.get(video["thumbnail_url"])
    assert verify(poster.content, poster.headers["content-type"], anchors).state == "trusted"
