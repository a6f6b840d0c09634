"""The whole graph over HTTP: a prompt in, a picture of it out."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import ray
from PIL import Image

from tests.graph.calls import ended, picture, submit
from tests.graph.running import PATIENCE_S, ROOT, Service, until

pytestmark = pytest.mark.ray


def test_a_prompt_becomes_a_picture_of_what_it_says(client: httpx.Client) -> None:
    job = ended(client, submit(client, prompt="a red circle in the center on white", seed=1))

    image = picture(client, job)
    red, green, blue = image.getpixel((64, 64))  # type: ignore[misc]
    assert (red > 180, green < 100, blue < 100) == (True, True, True), "the middle is red"
    assert min(image.getpixel((4, 4))) > 220, "the corner is white"  # type: ignore[type-var]


def test_schnell_is_corrected_to_four_steps_with_a_warning(client: httpx.Client) -> None:
    answer = client.post(
        "/api/generate/image",
        json={"model": "tiny-flux-schnell", "prompt": "a blue star", "steps": 30, "guidance_scale": 7.5},
    ).json()

    messages = [warning["message"] for warning in answer["warnings"]]
    assert "FLUX requires exactly 4 steps. Overriding 30 -> 4" in messages
    job = ended(client, answer["id"])
    assert job["status"] == "completed"
    assert job["steps"] == 4


def test_the_picture_says_how_it_was_made(client: httpx.Client) -> None:
    job = ended(client, submit(client, prompt="a green heart", seed=42))

    file = Image.open(io.BytesIO(client.get(job["artifacts"][0]["url"]).content))

    assert file.text["parameters"].startswith("a green heart\nSteps: 4, Sampler: auto")  # type: ignore[attr-defined]
    facts = json.loads(file.text["weft"])  # type: ignore[attr-defined]
    assert (facts["seed"], facts["model"]) == (42, "tiny-flux-schnell")


def test_the_store_knows_its_cluster_and_that_it_is_ready(service: Service) -> None:
    def lines() -> list[list[str]]:
        command = [sys.executable, "-m", "serve_app.cli", "clusters", "list"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [line.split() for line in listed.splitlines() if line.startswith("weft@")]

    (line,) = until(lambda: [line for line in lines() if line[1] == "ready"], "the cluster is ready")

    identity, address = line[0].removeprefix("weft@"), line[-1]
    assert re.fullmatch(r"[0-9a-f]{8}", identity)
    assert address == ray.get_runtime_context().gcs_address


def test_a_model_shows_which_batch_sizes_its_replica_has_proven(client: httpx.Client) -> None:
    model = client.get("/api/models/tiny-flux-schnell").json()

    assert model["exact"] == "prefer"
    known = {proof["module"] for proof in model["proofs"]}
    assert "FluxTransformer2DModel.forward" in known, "the warm-up has tried sizes"


def test_the_same_seed_gives_the_same_picture_alone_and_in_a_batch(client: httpx.Client) -> None:
    fields = {"prompt": "a yellow square on a blue background", "seed": 7}
    alone = picture(client, ended(client, submit(client, **fields)))

    others = [submit(client, prompt="two red stars", seed=n) for n in range(8)]
    together = picture(client, ended(client, submit(client, **fields)))
    for job_id in others:
        ended(client, job_id)

    difference = max(
        abs(a - b)
        for p, q in zip(alone.getdata(), together.getdata(), strict=True)
        for a, b in zip(p, q, strict=True)
    )
    assert difference <= 1, "float rounding may move a level, never more"


def test_img2img_and_inpainting_start_from_the_given_picture(client: httpx.Client) -> None:
    base = Image.new("RGB", (128, 128), "white")
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (64, 0, 128, 128))
    files = {name: _png(image) for name, image in (("image", base), ("mask_image", mask))}

    answer = client.post(
        "/api/generate/image",
        data={
            "model": "tiny-flux-schnell",
            "prompt": "a red circle on a white background",
            "strength": "1.0",
        },
        files={name: (f"{name}.png", data, "image/png") for name, data in files.items()},
    )
    job = ended(client, answer.json()["id"])

    assert job["status"] == "completed", job
    left = picture(client, job).crop((0, 0, 56, 128))
    assert min(min(pixel) for pixel in left.getdata()) == 255, "what the mask keeps stays white"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_progress_is_streamed_and_can_be_replayed_from_any_replica(client: httpx.Client) -> None:
    job_id = submit(client, model="slow-flux", prompt="a red circle", num_inference_steps=20)

    def read(last_id: str | None) -> tuple[list[str], list[str]]:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        with client.stream("GET", f"/api/generate/{job_id}/events", headers=headers) as stream:
            lines = list(stream.iter_lines())
        return (
            [line.removeprefix("event: ") for line in lines if line.startswith("event: ")],
            [line.removeprefix("id: ") for line in lines if line.startswith("id: ")],
        )

    names, ids = read(None)
    again, _ = read(ids[5])  # another connection: either ingress replica may answer

    assert names.count("step") == 21, "step 0 says how many there will be"
    assert names[-1] == "completed"
    assert again == names[6:]


def test_two_ingress_replicas_answer_for_each_other(service: Service) -> None:
    with ThreadPoolExecutor(8) as pool:

        def one(seed: int) -> str:
            with service.client() as mine:  # own connections, spread over the replicas
                return str(ended(mine, submit(mine, prompt="a red circle", seed=seed))["status"])

        states = list(pool.map(one, range(12)))

    assert states == ["completed"] * 12
    assert len(service.pids_of("Ingress")) == 2


def test_cancel_takes_effect_at_the_next_step_and_frees_the_slot(client: httpx.Client) -> None:
    job_id = submit(client, model="slow-flux", prompt="a red circle", num_inference_steps=1000)
    until(lambda: client.get(f"/api/generate/{job_id}").json()["step"] > 1, "the job runs")

    assert client.delete(f"/api/generate/{job_id}").status_code == 200

    assert ended(client, job_id)["status"] == "cancelled"
    after = ended(client, submit(client, model="slow-flux", prompt="a red circle"))
    assert after["status"] == "completed"


def test_the_openai_sdk_works_unchanged(service: Service) -> None:
    sdk = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", timeout=PATIENCE_S)

    answer = sdk.images.generate(
        model="tiny-flux-schnell", prompt="a red circle", n=2, size="128x128", response_format="b64_json"
    )

    assert answer.data is not None
    sizes = {Image.open(io.BytesIO(base64.b64decode(d.b64_json or ""))).size for d in answer.data}
    assert sizes == {(128, 128)}
    assert "tiny-flux-schnell" in [model.id for model in sdk.models.list()]
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        sdk.images.generate(model="nothing", prompt="a red circle")


def test_bad_input_is_refused_before_any_job_exists(client: httpx.Client) -> None:
    before = client.get("/api/generate/", params={"limit": 1}).json()

    for fields in (
        {"prompt": "x", "model": "unknown"},
        {"prompt": "x", "width": 77},
        {"prompt": "x", "seed": -2},
        {"prompt": "x" * 100_000},
        {"prompt": "x", "image": "bm90IGEgcGljdHVyZQ=="},
    ):
        answer = client.post("/api/generate/image", json={"model": "tiny-flux-schnell", **fields})
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]["message"]

    assert client.get("/api/generate/", params={"limit": 1}).json() == before


def test_an_answer_has_one_request_id_though_serve_adds_one_itself(client: httpx.Client) -> None:
    for path in ("/health", "/api/models/", "/nothing/here"):
        given = client.get(path, headers={"x-request-id": "caller-0001"})
        made = client.get(path)

        assert given.headers.get_list("x-request-id") == ["caller-0001"]
        assert len(made.headers.get_list("x-request-id")) == 1
    failed = client.post("/api/generate/image", json={"prompt": "a", "width": 1})
    assert len(failed.headers.get_list("x-request-id")) == 1


def test_head_has_the_head_of_get_through_serve(client: httpx.Client) -> None:
    for path in ("/", "/ui/", "/health", "/api/models/", "/docs"):
        got, head = client.get(path), client.head(path)

        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers["content-type"] == got.headers["content-type"] if got.content else True
        assert head.headers.get("content-length") == got.headers.get("content-length")


def test_the_page_and_the_docs_are_served(client: httpx.Client) -> None:
    page = client.get("/", follow_redirects=True)
    assert "<title" in page.text
    assert client.get("/docs").status_code == 200
    assert client.get("/health").status_code == 200
    assert client.get("/ready").json()["ready"] is True
    assert "weft_" in client.get("/metrics").text


def test_a_ray_job_calls_the_model_by_handle_and_limits_hold_there_too(service: Service) -> None:
    from ray import serve

    from deployments.protocol.events import Artifact, Failed
    from deployments.protocol.request import GenerationRequest

    handle = serve.get_deployment_handle("tiny-flux-schnell", "weft").options(
        method_name="generate", stream=True
    )

    events = list(handle.remote(GenerationRequest(model="tiny-flux-schnell", prompt="a red circle")))
    refused = list(handle.remote(GenerationRequest(model="tiny-flux-schnell", prompt="x", width=83)))

    assert [type(event).__name__ for event in events][-3:] == ["Artifact", "Artifact", "Done"]
    image = next(event for event in events if isinstance(event, Artifact))
    assert Image.open(io.BytesIO(image.data)).size == (128, 128)
    assert isinstance(refused[-1], Failed)
    assert "multiple of 16" in refused[-1].message


def test_the_example_ray_job_makes_a_folder_of_pictures(service: Service, tmp_path: Path) -> None:
    from examples.ray_job import generate_images

    prompts = ["a red circle", "two blue stars", "a green heart"]
    files = generate_images(prompts, str(tmp_path), "tiny-flux-schnell")

    assert [Image.open(io.BytesIO(Path(file).read_bytes())).size for file in files] == [(128, 128)] * 3
