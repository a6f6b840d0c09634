"""Images of the native dialect: a request, a job to follow, and its files."""

import base64
import io

import httpx
import pytest
from PIL import Image

from tests.serving.api import forged
from tests.serving.api.calls import ended, submitted
from tests.serving.api.fake_model import FakeModel


async def test_a_request_is_accepted_at_once_and_read_back_by_its_id(client: httpx.AsyncClient):
    answer = await client.post("/api/generate/image", json={"prompt": "a red fox", "seed": 7})

    assert answer.status_code == 202
    accepted = answer.json()
    assert accepted["status"] == "queued"
    assert accepted["warnings"] == []
    assert answer.headers["location"] == f"/api/generate/{accepted['id']}"
    job = (await client.get(answer.headers["location"])).json()
    assert job["position"] == 1
    assert job["request"]["model"] == "sketch"  # the ready one
    assert job["request"]["seed"] == 7
    assert job["request"]["num_inference_steps"] == 20


async def test_schnell_is_corrected_to_four_steps_and_the_caller_is_warned(client: httpx.AsyncClient):
    answer = await client.post(
        "/api/generate/image", json={"model": "tiny-flux-schnell", "prompt": "a red fox", "steps": 30}
    )

    assert [w["code"] for w in answer.json()["warnings"]] == ["steps_corrected"]
    assert "30 -> 4" in answer.json()["warnings"][0]["message"]


async def test_a_finished_job_lists_its_pictures_and_they_download(
    client: httpx.AsyncClient, fake_model: FakeModel
):
    job_id = await submitted(client, seed=5, num_images=2, output_format="webp")

    job = await ended(client, job_id)

    assert job["status"] == "completed"
    assert job["percent"] == 100
    first, second = job["artifacts"]
    assert (first["seed"], second["seed"]) == (5, 6)
    assert first["url"] == f"/api/results/{job_id}/0.webp"
    picture = await client.get(second["url"])
    assert Image.open(io.BytesIO(picture.content)).size == (128, 128)
    assert picture.headers["content-type"] == "image/webp"
    assert picture.headers["x-content-type-options"] == "nosniff"
    assert picture.headers["content-disposition"] == f'inline; filename="weft-{job_id}-1.webp"'
    assert picture.headers["cache-control"].startswith("private")
    small = await client.get(first["thumbnail_url"])
    assert Image.open(io.BytesIO(small.content)).size == (32, 32)


async def test_a_picture_already_held_is_answered_with_304(client: httpx.AsyncClient, fake_model: FakeModel):
    job_id = await submitted(client)
    await ended(client, job_id)
    first = await client.get(f"/api/results/{job_id}/0.png")

    again = await client.get(f"/api/results/{job_id}/0.png", headers={"if-none-match": first.headers["etag"]})

    assert again.status_code == 304
    assert again.content == b""


async def test_a_picture_is_saved_under_its_task_id_when_asked_as_attachment(
    client: httpx.AsyncClient, fake_model: FakeModel
):
    job_id = await submitted(client, output_format="jpeg")
    await ended(client, job_id)

    picture = await client.get(f"/api/results/{job_id}/0.jpg?attachment=true")

    assert picture.headers["content-disposition"] == f'attachment; filename="weft-{job_id}-0.jpg"'


@pytest.mark.parametrize("name", ["1.png", "0.webp", "0", "0.png.html", "00000.png"])
async def test_a_picture_the_job_does_not_have_is_a_404(
    client: httpx.AsyncClient, fake_model: FakeModel, name: str
):
    job_id = await submitted(client)
    await ended(client, job_id)

    assert (await client.get(f"/api/results/{job_id}/{name}")).status_code == 404


async def test_a_form_with_files_is_an_inpainting_job(client: httpx.AsyncClient, fake_model: FakeModel):
    answer = await client.post(
        "/api/generate/image",
        data={"model": "tiny-flux-schnell", "prompt": "a red fox", "strength": "0.75", "seed": ""},
        files={"image": ("fox.png", forged.png()), "mask_image": ("mask.png", forged.png())},
    )

    job = await ended(client, answer.json()["id"])
    assert job["request"]["task"] == "inpaint"
    assert fake_model.requests[0].edit is not None
    assert fake_model.requests[0].edit.image == forged.png()


async def test_a_form_may_bring_a_control_picture(client: httpx.AsyncClient, fake_model: FakeModel):
    answer = await client.post(
        "/api/generate/image",
        data={"prompt": "a red fox", "control_type": "canny", "control_weight": "0.5", "control_end": "0.8"},
        files={"control_image": ("edges.png", forged.png())},
    )

    job = await ended(client, answer.json()["id"])
    assert job["request"]["model"] == "sketch"
    assert job["request"]["controls"] == [
        {"type": "canny", "weight": 0.5, "start": 0.0, "end": 0.8, "is_map": None}
    ]
    assert [control.image for control in fake_model.requests[0].controls] == [forged.png()]


async def test_several_control_pictures_go_with_a_picture_to_start_from(
    client: httpx.AsyncClient, fake_model: FakeModel
):
    pictures = [base64.b64encode(data).decode() for data in (forged.png(), forged.jpeg(), forged.webp())]
    controls = [
        {"image": pictures[1], "type": "canny"},
        {"image": pictures[2], "type": "depth", "is_map": True, "weight": 1.5},
    ]

    job = await ended(client, await submitted(client, model="sketch", image=pictures[0], controls=controls))

    assert job["request"]["task"] == "i2i"
    assert [control["weight"] for control in job["request"]["controls"]] == [1.0, 1.5]
    given = fake_model.requests[0]
    assert given.edit is not None
    assert given.edit.image == forged.png()
    assert [control.image for control in given.controls] == [forged.jpeg(), forged.webp()]


async def test_refine_takes_the_first_model_that_refines(client: httpx.AsyncClient, fake_model: FakeModel):
    answer = await client.post(
        "/refine", data={"prompt": "a red fox"}, files={"image": ("fox.png", forged.png())}
    )

    assert answer.status_code == 202
    job = await ended(client, answer.json()["task_id"])
    assert (job["request"]["model"], job["request"]["task"]) == ("sketch", "refine")
    assert fake_model.requests[0].refine


@pytest.mark.parametrize(("asked", "used"), [(True, 0.8), (0.6, 0.6), (False, None)])
async def test_the_refiner_takes_over_when_it_is_asked_to(
    client: httpx.AsyncClient, fake_model: FakeModel, asked: bool | float, used: float | None
):
    job = await ended(client, await submitted(client, model="sketch", refiner=asked))

    assert job["request"]["refiner"] == used
    assert fake_model.requests[0].refiner == used


async def test_a_model_lists_its_control_types_and_its_refiner(client: httpx.AsyncClient):
    sketch = (await client.get("/api/models/sketch")).json()
    schnell = (await client.get("/api/models/tiny-flux-schnell")).json()

    assert [(control["type"], control["plain_pictures"]) for control in sketch["controls"]] == [
        ("canny", True),
        ("depth", False),
    ]
    assert (sketch["refiner"], sketch["refiner_start"]) == ("sketch-refiner", 0.8)
    assert (schnell["controls"], schnell["refiner"]) == ([], None)


@pytest.mark.parametrize("path", ["/api/generate/image", "/generate-image"])
@pytest.mark.parametrize("how", ["json", "form"])
async def test_previews_are_asked_for_in_every_form_and_face(
    client: httpx.AsyncClient, fake_model: FakeModel, path: str, how: str
):
    if how == "json":
        answer = await client.post(path, json={"model": "sketch", "prompt": "a red fox", "previews": 4})
    else:
        form = {"model": "sketch", "prompt": "a red fox", "previews": "4"}
        answer = await client.post(path, data=form, files={"image": ("fox.png", forged.png())})
    assert answer.status_code == 202, answer.text

    job = await ended(client, next(iter(answer.json().values())))

    assert job["request"]["previews"] == 4
    assert [request.output.previews for request in fake_model.requests] == [4]


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
async def test_a_picture_in_json_is_base64_or_a_data_url(
    client: httpx.AsyncClient, fake_model: FakeModel, prefix: str
):
    text = prefix + base64.b64encode(forged.png()).decode()

    job = await ended(client, await submitted(client, image=text, strength=0.5))

    assert job["request"]["task"] == "i2i"
    assert fake_model.requests[0].edit is not None
    assert fake_model.requests[0].edit.image == forged.png()


async def test_jobs_are_listed_newest_first_page_by_page_and_filtered(client: httpx.AsyncClient):
    ids = [await submitted(client, seed=n) for n in range(3)]
    await client.delete(f"/api/generate/{ids[0]}")

    first = (await client.get("/api/generate/?limit=2")).json()
    second = (await client.get("/api/generate/", params={"cursor": first["next_cursor"]})).json()
    cancelled = (await client.get("/api/generate/?status=cancelled&model=sketch")).json()

    assert [job["id"] for job in first["jobs"]] == [ids[2], ids[1]]
    assert [job["id"] for job in second["jobs"]] == [ids[0]]
    assert second["next_cursor"] is None
    assert [job["id"] for job in cancelled["jobs"]] == [ids[0]]


async def test_a_waiting_job_is_cancelled_at_once_and_then_deleted(client: httpx.AsyncClient):
    job_id = await submitted(client)

    cancelled = await client.delete(f"/api/generate/{job_id}")
    deleted = await client.delete(f"/api/generate/{job_id}")

    assert cancelled.json() == {"id": job_id, "status": "cancelled"}
    assert deleted.json() == {"id": job_id, "status": "deleted"}
    assert (await client.get(f"/api/generate/{job_id}")).status_code == 404


async def test_without_a_ready_model_the_first_that_can_do_the_task_is_taken(client: httpx.AsyncClient):
    answer = await client.post(
        "/api/generate/image",
        json={
            "prompt": "a fox",
            "image": base64.b64encode(forged.png()).decode(),
            "mask_image": base64.b64encode(forged.png()).decode(),
        },
    )

    job = (await client.get(f"/api/generate/{answer.json()['id']}")).json()
    assert job["request"]["model"] == "tiny-flux-schnell"
