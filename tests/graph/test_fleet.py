"""configs/serve/fleet.yaml on tiny weights: a gateway, and models that come, change and go beside it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeInstanceDetails

from serve_app.ray_serve import local_cluster
from tests.graph.calls import ended, events_of, picture
from tests.graph.running import PATIENCE_S, ROOT, Service, kill, until

pytestmark = pytest.mark.ray

WEIGHTS = {  # whose tiny model stands for which
    "stable-diffusion-v1.5": "tiny-sd15",
    "dreamshaper-8": "tiny-sd15",
    "realistic-vision-v6": "tiny-sd15",
    "sdxl-base-1.0": "tiny-sdxl-base",
    "sdxl-refiner-1.0": "tiny-sdxl-refiner",
    "flux.1-schnell": "tiny-flux-schnell",
    "flux.1-dev": "tiny-flux-dev",
    "hunyuan-video": "tiny-wan",
}
GATEWAY = "fleet"
Pids = dict[tuple[str, str], list[int]]  # by application and deployment


def tiny_card(card_id: str, tiny: str, **serving: Any) -> dict[str, Any]:
    """The card of a shipped tiny model under another id, on a GPU that exists for Ray only."""
    card: dict[str, Any] = yaml.safe_load((ROOT / f"configs/models/{tiny}.yaml").read_text(encoding="utf-8"))
    card["serving"] = {"num_gpus": 1, "num_cpus": 0.1, "slots": 8, "max_rows": 8, "warm_up": False} | serving
    if tiny == "tiny-sd15":  # what it stands for makes pictures only
        del card["videos"]
        card["tasks"] = ["t2i", "i2i"]
    if "refiner" in card:  # under the name that it has here
        (card["refiner"],) = (name for name, weights in WEIGHTS.items() if weights == card["refiner"])
    return card | {"id": card_id, "aliases": []}


def slow_card(card_id: str, **serving: Any) -> dict[str, Any]:
    """One with free steps, so that jobs can last."""
    steps = {"min": 1, "default": 4, "max": 1000}
    card = tiny_card(card_id, "tiny-flux-schnell", **serving)
    return card | {"steps": steps, "corrects": False, "adapters": []}


class Fleet:
    """The shipped config on the session's Serve, beside what is deployed there already."""

    def __init__(self, service: Service, cards: Path) -> None:
        self._service = service
        self.settings = {
            "cards_dir": str(cards),
            "redis_prefix": "weft:fleet:",
            "lease_s": 6.0,
            "heartbeat_s": 0.5,
            "max_attempts": 10,  # on a busy machine a lease may run out though its worker lives
        }
        shipped = yaml.safe_load((ROOT / "configs/serve/fleet.yaml").read_text(encoding="utf-8"))
        gateway, *models = shipped["applications"]
        gateway |= {"name": GATEWAY, "route_prefix": "/fleet"}
        gateway["args"]["settings"] = self.settings
        for model in models:
            model["args"] |= {"settings": self.settings, "gateway": GATEWAY}
        for deployment in (one for each in shipped["applications"] for one in each.get("deployments", [])):
            deployment["ray_actor_options"]["num_cpus"] = 0.1  # not a node for each
        self.shipped: list[dict[str, Any]] = [gateway, *models]
        self.client = httpx.Client(base_url=f"{service.url}/fleet", timeout=PATIENCE_S)

    def model(self, card: dict[str, Any]) -> dict[str, Any]:
        """An application of this one card."""
        args = {"models": [card], "settings": self.settings, "gateway": GATEWAY}
        return {
            "name": f"model-{card['id']}",
            "route_prefix": None,
            "import_path": "serve_app.app:build_model",
            "args": args,
        }

    def deploy(self, *added: dict[str, Any]) -> None:
        """As `serve deploy` of the shipped file with these added to it; returns when all of it runs."""
        config = copy.deepcopy(self._service.config)
        config["applications"] += [*self.shipped, *added]
        lines: list[str] = []
        assert local_cluster.deploy(config, lines.append), "\n".join(lines)
        names = {application["name"] for application in [*self.shipped, *added]}
        until(lambda: {name for name, _ in self.pids()} <= names, "removed applications are gone")
        ids = {card["id"] for each in added for card in each["args"]["models"]}
        until(lambda: ids <= self.models().keys() <= ids | WEIGHTS.keys(), "the gateway knows its models")

    def submit(self, model: str, **fields: Any) -> str:
        """Id of the accepted job. Each ingress replica learns of a new model within 2 s, by itself."""
        body = {"model": model, "prompt": "a red circle", **fields}

        def accepted() -> httpx.Response | None:
            answer = self.client.post("/api/generate/image", json=body)
            return None if answer.status_code == 404 else answer

        answer = until(accepted, f"the gateway takes a request for {model}")
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def refusal(self, model: str) -> str:
        """The message that a request for this model is refused with."""

        def refused() -> httpx.Response | None:
            answer = self.client.post("/api/generate/image", json={"model": model, "prompt": "a red circle"})
            return answer if answer.status_code != 202 else None

        answer = until(refused, f"the gateway refuses a request for {model}")
        assert answer.status_code == 404, answer.text
        return str(answer.json()["error"]["message"])

    def models(self) -> dict[str, str]:
        """State of every model, by id."""
        listed = self.client.get("/api/models").json()["models"]
        return {model["id"]: model["state"] for model in listed}

    def failure(self, model: str) -> dict[str, Any] | None:
        """Why a model cannot serve."""
        found: dict[str, Any] | None = self.client.get(f"/api/models/{model}").json()["failure"]
        return found

    def pids(self) -> Pids:
        """Of the fleet's replicas, by application and deployment."""
        client = _get_global_client()
        assert client is not None
        details = ServeInstanceDetails(**client.get_serve_details())
        return {
            (name, deployment): sorted(replica.pid for replica in found.replicas if replica.pid is not None)
            for name, application in details.applications.items()
            if name == GATEWAY or name.startswith("model-")
            for deployment, found in application.deployments.items()
        }

    def picture(self, job: dict[str, Any]) -> bytes:
        """Its pixels: the file also contains how long it took."""
        with self._service.client() as client:
            return picture(client, job).tobytes()


@pytest.fixture(scope="module")
def fleet(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    cards = tmp_path_factory.mktemp("tiny")
    for card_id, tiny in WEIGHTS.items():
        (cards / f"{card_id}.yaml").write_text(yaml.safe_dump(tiny_card(card_id, tiny)), encoding="utf-8")
    made = Fleet(service, cards)
    made.deploy()
    yield made
    made.client.close()
    assert local_cluster.deploy(service.config, lambda line: None)


def others(pids: Pids, application: str) -> Pids:
    return {place: found for place, found in pids.items() if place[0] != application}


def test_the_shipped_fleet_comes_up_without_a_single_gpu_and_wakes_a_model_that_is_asked_for(
    fleet: Fleet,
) -> None:
    served = {model for model in WEIGHTS if model != "sdxl-refiner-1.0"}
    until(lambda: fleet.models() == dict.fromkeys(served, "idle"), "all of it sleeps")

    ids = [fleet.submit(model, num_inference_steps=4) for model in ("flux.1-schnell", "dreamshaper-8")]
    jobs = [ended(fleet.client, each) for each in ids]

    assert [job["status"] for job in jobs] == ["completed", "completed"]
    awake = {"flux.1-schnell", "stable-diffusion-v1.5", "dreamshaper-8", "realistic-vision-v6"}
    until(lambda: {model for model, state in fleet.models().items() if state == "ready"} == awake, "two wake")
    assert len(fleet.pids()[GATEWAY, "Ingress"]) == len(fleet.pids()[GATEWAY, "Dispatcher"]) == 2


def test_models_come_change_and_go_and_no_other_replica_notices(fleet: Fleet) -> None:
    fleet.deploy()
    before = fleet.pids()

    card = slow_card("newcomer", slots=1, min_replicas=1)
    fleet.deploy(fleet.model(card))
    added = fleet.pids()
    job = ended(fleet.client, fleet.submit("newcomer"))
    fleet.deploy(fleet.model(slow_card("newcomer", slots=2, min_replicas=1)))
    changed = fleet.pids()
    fleet.deploy()
    message = fleet.refusal("newcomer")

    assert job["status"] == "completed"
    assert others(added, "model-newcomer") == others(changed, "model-newcomer") == before
    assert fleet.pids() == before
    place = "model-newcomer", "newcomer"
    assert len(added[place]) == 1
    assert not set(added[place]) & set(changed[place])
    assert "there is no model 'newcomer' here; there is dreamshaper-8, flux.1-dev, " in message
    until(lambda: "newcomer" not in fleet.client.get("/v1/models").text, "the list of models shows it too")


def test_jobs_of_a_model_that_goes_wait_until_it_comes_back(fleet: Fleet) -> None:
    model = fleet.model(slow_card("guest", slots=1, min_replicas=1))
    fleet.deploy(model)
    jobs = [fleet.submit("guest", num_inference_steps=150, seed=seed) for seed in range(4)]
    until(lambda: fleet.client.get(f"/api/generate/{jobs[0]}").json()["step"] > 3, "the first runs")

    fleet.deploy()
    left = [fleet.client.get(f"/api/generate/{job}").json()["status"] for job in jobs]
    fleet.deploy(model)

    assert "queued" in left
    assert "failed" not in left
    assert [ended(fleet.client, job)["status"] for job in jobs] == ["completed"] * 4
    fleet.deploy()


def test_a_model_that_cannot_be_loaded_says_why_until_its_operator_mends_it(
    fleet: Fleet, tmp_path: Path
) -> None:
    folder = tmp_path / "unfinished"
    card = slow_card("unfinished", num_gpus=0, min_replicas=1)
    card["weights"]["path"] = str(folder)
    fleet.deploy(fleet.model(card))

    refused = ended(fleet.client, fleet.submit("unfinished"))
    shown = until(lambda: fleet.failure("unfinished"), "the gateway shows the reason")
    shutil.copytree(ROOT / "models/tiny-flux-schnell", folder)
    served = ended(fleet.client, fleet.submit("unfinished"))
    until(lambda: fleet.models()["unfinished"] == "ready", "the gateway knows that it is loaded")

    assert refused["error"]["kind"] == shown["kind"] == "model_failed"
    for message in (refused["error"]["message"], shown["message"]):
        assert f"no weights in {folder}: model_index.json is missing" in message
    assert served["status"] == "completed"
    fleet.deploy()


def test_one_of_each_kind_is_killed_in_mid_job_and_every_job_ends_once(
    fleet: Fleet, service: Service
) -> None:
    fleet.deploy(fleet.model(slow_card("replicated", slots=2, num_gpus=0, min_replicas=3, max_replicas=3)))
    fields = {"num_inference_steps": 200, "seed": 5}
    undisturbed = fleet.picture(ended(fleet.client, fleet.submit("replicated", **fields)))
    jobs = [fleet.submit("replicated", **fields) for _ in range(9)]

    def running() -> int:
        steps = [fleet.client.get(f"/api/generate/{job}").json()["step"] for job in jobs]
        return sum(5 < step < 150 for step in steps)

    until(lambda: running() >= 3, "several run")
    pids = fleet.pids()
    for place in ((GATEWAY, "Ingress"), (GATEWAY, "Dispatcher"), ("model-replicated", "replicated")):
        kill(pids[place][0])

    def look(job: str) -> dict[str, Any] | None:
        try:
            answer = httpx.get(f"{service.url}/fleet/api/generate/{job}", timeout=PATIENCE_S)
        except httpx.TransportError:
            return None
        found: dict[str, Any] = answer.json() if answer.status_code == 200 else {"status": "unknown"}
        return found if found["status"] in ("completed", "failed", "cancelled") else None

    done = [until(lambda job=job: look(job), f"job {job} ends") for job in jobs]  # type: ignore[misc]

    assert [job["status"] for job in done] == ["completed"] * 9
    assert {fleet.picture(job) for job in done} == {undisturbed}
    with httpx.Client(base_url=f"{service.url}/fleet", timeout=PATIENCE_S) as client:
        assert [len(events_of(client, job, "completed")) for job in jobs] == [1] * 9
    fleet.deploy()
