"""One real Serve instance for all tests of this folder: real Ray, real Valkey, trained tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from serve_app.redis.embedded import EmbeddedRedis
from tests import service_settings
from tests.graph.clusters import RayCluster
from tests.graph.running import RAY, ROOT, Service, free_port
from tests.patience import slowness


@pytest.fixture(scope="session")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped tiny model as it is, and once more with free steps, so that jobs can last."""
    folder = tmp_path_factory.mktemp("cards")
    card = yaml.safe_load((ROOT / "configs/models/tiny-flux-schnell.yaml").read_text())
    (folder / "tiny-flux-schnell.yaml").write_text(yaml.safe_dump(card))
    wan = (ROOT / "configs/models/tiny-wan.yaml").read_text()
    (folder / "tiny-wan.yaml").write_text(wan)
    slow = card | {"id": "slow-flux", "name": "Slow", "corrects": False}
    slow["adapters"] = []
    slow["serving"] = card["serving"] | {"lora": "shared"}
    slow["steps"] = {"min": 1, "default": 4, "max": 1000}
    (folder / "slow-flux.yaml").write_text(yaml.safe_dump(slow))
    return folder


@pytest.fixture(scope="session")
def service(cards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data = tmp_path_factory.mktemp("data")
    port = free_port()
    settings = {
        "WEFT_DATA_DIR": str(data),
        "WEFT_CARDS_DIR": str(cards),
        "WEFT_LEASE_S": str(3 * slowness()),
        "WEFT_HEARTBEAT_S": "0.5",
        "WEFT_READS_PER_MINUTE": "100000",  # tests ask often
        "WEFT_CACHE": "false",  # a repeated request must run again
        "WEFT_LOGICAL_GPUS": "true",
        "WEFT_TRACE_DIR": str(data / "traces"),
        "WEFT_MODEL_CACHE": str(data / "models"),
        "RAY_metrics_report_interval_ms": "1000",  # ten seconds are long for a test
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "PYTHONPATH": str(ROOT),
        **RAY,
    }
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = port
    config["tracing_config"] = {
        "enabled": True,
        "exporter_import_path": "serve_app.observability.tracing:exporters",
        "sampling_ratio": 1.0,
    }
    config["applications"][0]["args"]["models"] = ["tiny-flux-schnell", "slow-flux", "tiny-wan"]
    config["applications"][0]["deployments"] = [{"name": "Ingress", "num_replicas": 2}]  # override by name
    service_settings.apply(settings)
    valkey = EmbeddedRedis(data)
    try:
        service_settings.apply({"REDIS_URL": valkey.start()})
        from serve_app.ray_serve import local_cluster

        places = {f"accelerator_type:{name}": 1 for name in ("A10G", "L40S", "H100")}  # as Ray counts them
        places |= {"front": 100, "encoder": 100}
        with local_cluster.local_ray(num_cpus=8, num_gpus=8, resources=places):
            lines: list[str] = []
            assert local_cluster.deploy(config, lines.append), "\n".join(lines)
            yield Service(f"http://127.0.0.1:{port}", valkey, config)
    finally:
        valkey.stop()
        service_settings.remove()


@pytest.fixture(autouse=True)
def a_service_that_answers(request: pytest.FixtureRequest) -> None:
    """Skip the wait of all later tests when one has left the shared service broken."""
    if "service" in request.fixturenames:
        request.getfixturevalue("service").require(request.node.nodeid)


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as made:
        yield made


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head and a worker with one logical GPU, where the tiny FLUX serves as slow-flux."""
    with RayCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.add_worker("worker")
        model = cluster.card(serving={"min_replicas": 1})
        cluster.serve(cluster.config(args={"models": [model]}))
        yield cluster
