"""Whatever single process dies in mid-job: the job finishes, once, with the same picture."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.graph.calls import Undisturbed, ended, events_of, picture, submit
from tests.graph.running import Service, kill, until

pytestmark = pytest.mark.ray

REQUEST = {"model": "slow-flux", "prompt": "a red circle", "num_inference_steps": 300, "seed": 5}


def victims(service: Service) -> dict[str, Callable[[], int]]:
    return {
        "the dispatcher": lambda: service.pid_of("Dispatcher"),
        "the model replica": lambda: service.pid_of("slow-flux"),
        "Valkey": lambda: service.valkey.pid,
    }


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> Undisturbed:
    with service.client() as client:
        return Undisturbed.of(client, **REQUEST)


@pytest.mark.parametrize("victim", ["the dispatcher", "the model replica", "Valkey"])
def test_a_job_survives_kill_9_of(
    victim: str,
    service: Service,
    client: httpx.Client,
    undisturbed: Undisturbed,
    record_property: Callable[[str, object], None],
) -> None:
    began = time.monotonic()
    job_id = submit(client, **REQUEST)
    until(lambda: client.get(f"/api/generate/{job_id}").json()["step"] > 5, "the job runs")

    kill(victims(service)[victim]())

    def back() -> bool:
        answer = client.get(f"/api/generate/{job_id}")
        return answer.status_code == 200 and answer.json()["status"] == "completed"

    until(back, "the job completes")
    late_s = time.monotonic() - began - undisturbed.seconds
    record_property(f"recovery_{victim.removeprefix('the ').replace(' ', '_').lower()}_s", late_s)
    job = client.get(f"/api/generate/{job_id}").json()
    assert len(job["artifacts"]) == 1
    assert picture(client, job).tobytes() == undisturbed.image.tobytes()


def test_a_new_job_is_served_after_all_of_that(client: httpx.Client) -> None:
    assert ended(client, submit(client, prompt="a blue star"))["status"] == "completed"


def test_a_killed_ingress_replica_loses_no_job(service: Service, client: httpx.Client) -> None:
    job_id = submit(client, **REQUEST)

    kill(service.pid_of("Ingress"))

    what = "the other replica reports that the job completed"
    until(lambda: seen_by_a_fresh_client(service, job_id, "completed"), what)


@pytest.mark.parametrize("actor", ["ProxyActor", "ServeController"])
def test_a_killed_part_of_serve_comes_back_and_no_job_notices(actor: str, service: Service) -> None:
    with service.client() as before:
        job_id = submit(before, **REQUEST)
    (victim,) = service.pids_with(f"ray::{actor}")

    kill(victim)

    job = until(lambda: seen_by_a_fresh_client(service, job_id, "completed"), "the job completes")
    until(lambda: service.pids_with(f"ray::{actor}"), f"{actor} is back", every_s=0.5)
    with service.client() as after:
        assert ended(after, submit(after, prompt="a blue star"))["status"] == "completed"
    assert len(job["artifacts"]) == 1


def seen_by_a_fresh_client(service: Service, job_id: str, status: str) -> dict[str, Any] | None:
    """The job, once it is so; None also while no server answers."""
    with service.client() as fresh:
        try:
            answer = fresh.get(f"/api/generate/{job_id}")
        except httpx.TransportError:
            return None
    job: dict[str, Any] = answer.json() if answer.status_code == 200 else {}
    return job if job.get("status") == status else None


@pytest.mark.parametrize("header", [{}, {"x-request-disconnect-disabled": "?1"}])
def test_a_client_that_leaves_a_synchronous_call_cancels_its_job(
    header: dict[str, str], service: Service, client: httpx.Client
) -> None:
    body = json.dumps({"model": "slow-flux", "prompt": "left alone", "num_inference_steps": 1000})
    url = httpx.URL(service.url)
    head = {"host": url.netloc.decode(), "content-type": "application/json", "content-length": str(len(body))}
    lines = ["POST /v1/images/generations HTTP/1.1", *(f"{n}: {v}" for n, v in (head | header).items())]

    def mine(status: str) -> list[dict[str, Any]]:
        jobs = client.get("/api/generate/", params={"status": status, "model": "slow-flux"}).json()["jobs"]
        return [job for job in jobs if job["request"]["prompt"] == "left alone"]

    before = len(mine("cancelled"))
    with socket.create_connection((url.host, url.port or 80)) as caller:
        caller.sendall(("\r\n".join(lines) + "\r\n\r\n" + body).encode())
        until(lambda: mine("processing"), "its job runs")

    until(lambda: len(mine("cancelled")) > before, "its job is cancelled")


def test_a_replica_that_is_stopped_hands_its_job_on_where_it_stands(
    service: Service, client: httpx.Client
) -> None:
    long = REQUEST | {"num_inference_steps": 900}
    undisturbed = picture(client, ended(client, submit(client, **long)))
    job_id = submit(client, **long)
    until(lambda: client.get(f"/api/generate/{job_id}").json()["step"] > 300, "the job runs")

    stopped = service.pid_of("slow-flux")
    service.stop_gracefully("slow-flux")
    kill(stopped)  # Serve's controller would do that next
    job = ended(client, job_id)
    steps = [event["step"] for event in events_of(client, job_id, "step")]

    assert job["status"] == "completed"
    assert picture(client, job).tobytes() == undisturbed.tobytes()
    assert len(steps) > 100
    assert len(set(steps)) == len(steps), "it went on from where the first replica stood"
