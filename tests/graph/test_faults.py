"""Whatever single process dies in mid-job: the job finishes, once, with the same picture."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from tests.graph.calls import ended, picture, submit, told
from tests.graph.running import Service, kill, until

pytestmark = pytest.mark.ray

WISH = {"model": "slow-flux", "prompt": "a red circle", "num_inference_steps": 300, "seed": 5}


def victims(service: Service) -> dict[str, Callable[[], int]]:
    return {
        "the dispatcher": lambda: service.pid_of("Dispatcher"),
        "the model replica": lambda: service.pid_of("slow-flux"),
        "Valkey": lambda: service.valkey.pid,
    }


@pytest.mark.parametrize("victim", ["the dispatcher", "the model replica", "Valkey"])
def test_a_job_survives_kill_9_of(victim: str, service: Service, client: httpx.Client) -> None:
    undisturbed = picture(client, ended(client, submit(client, **WISH)))
    job_id = submit(client, **WISH)
    until(lambda: client.get(f"/api/generate/{job_id}").json()["step"] > 5, "the job runs")

    kill(victims(service)[victim]())

    def back() -> bool:
        answer = client.get(f"/api/generate/{job_id}")
        return answer.status_code == 200 and answer.json()["status"] == "completed"

    until(back, "the job completes")
    job = client.get(f"/api/generate/{job_id}").json()
    assert len(job["artifacts"]) == 1
    assert picture(client, job).tobytes() == undisturbed.tobytes()


def test_a_new_job_is_served_after_all_of_that(client: httpx.Client) -> None:
    assert ended(client, submit(client, prompt="a blue star"))["status"] == "completed"


def test_a_killed_ingress_replica_loses_no_job(service: Service, client: httpx.Client) -> None:
    job_id = submit(client, **WISH)

    kill(service.pid_of("Ingress"))

    def look() -> bool:
        with service.client() as fresh:
            try:
                answer = fresh.get(f"/api/generate/{job_id}")
            except httpx.TransportError:
                return False
        return answer.status_code == 200 and answer.json()["status"] == "completed"

    until(look, "the other replica tells that the job completed")


def test_a_replica_that_is_stopped_hands_its_job_on_where_it_stands(
    service: Service, client: httpx.Client
) -> None:
    long = WISH | {"num_inference_steps": 900}
    undisturbed = picture(client, ended(client, submit(client, **long)))
    job_id = submit(client, **long)
    until(lambda: client.get(f"/api/generate/{job_id}").json()["step"] > 300, "the job runs")

    stopped = service.pid_of("slow-flux")
    service.stop_gracefully("slow-flux")
    kill(stopped)  # Serve's controller would do that next
    job = ended(client, job_id)
    steps = [event["step"] for event in told(client, job_id, "step")]

    assert job["status"] == "completed"
    assert picture(client, job).tobytes() == undisturbed.tobytes()
    assert len(steps) > 100
    assert len(set(steps)) == len(steps), "it went on from where the first replica stood"
