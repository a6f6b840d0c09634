"""A model that cannot be loaded says why within seconds, and is tried again when that may help."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import diffusers
import fsspec
import huggingface_hub
import pytest
from huggingface_hub import constants, hf_api
from pydantic import SecretStr

from deployments.models import model_loader, weight_cache
from deployments.models.load_errors import explain
from deployments.models.load_failures import LoadFailures
from deployments.models.model_loader import ModelLoader
from deployments.protocol.card import Licence, ModelCard, Weights
from deployments.protocol.errors import ModelFailed, ModelUnavailable, OutOfMemory, WeftError
from deployments.protocol.events import Done, Failed
from deployments.protocol.installation import Installation
from deployments.replica import ModelReplica
from tests.inference.test_replica import CARD, events_of

ROOT = Path(__file__).resolve().parents[3]
REPO = "someone/gated-model"
LICENCE = Licence(name="FLUX.1 licence", url="https://licences.example/flux", gated=True)
SERVING = CARD.serving.model_copy(update={"warm_up": False})


class Hub:
    """An HTTP server in place of the hub: answers every call with one status."""

    def __init__(self) -> None:
        self.status, self.code, self.calls = 404, "", 0
        self.authorizations: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.calls += 1
                hub.authorizations.add(self.headers["Authorization"])
                self.send_response(hub.status)
                if hub.code:
                    self.send_header("X-Error-Code", hub.code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """As HF_ENDPOINT, which huggingface_hub reads when it is imported."""
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever a test sets
        monkeypatch.delenv(name)
    yield hub
    hub.close()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_loader, "RETRY_PAUSES_S", (0.0, 0.0))


def card_of(model_id: str = "broken", **weights: Any) -> ModelCard:
    return CARD.model_copy(
        update={
            "id": model_id,
            "weights": Weights(**weights, dtype="float32"),
            "licence": LICENCE,
            "serving": SERVING,
        }
    )


class NoLoras:
    async def read(self, digest: str) -> bytes:
        raise AssertionError(digest)


def failure_of(card: ModelCard) -> WeftError:
    """The error with which the real loading code leaves this card."""
    loader = ModelLoader([card], {}, NoLoras(), gpu_share=0)
    loader.open_cache()
    error = loader.failures.error_of(card.id)
    assert error is not None
    return error


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (403, "GatedRepo", ModelFailed, ["licence", "licences.example/flux", f"co/{REPO}", "HF_TOKEN"]),
        (401, "GatedRepo", ModelFailed, ["licence", "now there is no HF_TOKEN"]),
        (403, "", ModelFailed, ["licence", "HF_TOKEN"]),
        (404, "RepoNotFound", ModelFailed, ["correct weights.repo", "HF_TOKEN"]),
        (401, "RepoNotFound", ModelFailed, ["correct weights.repo", "HF_TOKEN"]),
        (404, "RevisionNotFound", ModelFailed, ["no revision 'main'", "weights.revision"]),
        (429, "", ModelUnavailable, ["429", "too many requests"]),
        (500, "", ModelUnavailable, ["answers 500"]),
        (503, "", ModelUnavailable, ["answers 503"]),
    ],
)
def test_what_the_hub_answers_is_named_with_its_cure(
    hub: Hub, status: int, code: str, kind: type[WeftError], words: list[str]
) -> None:
    hub.status, hub.code = status, code

    error = failure_of(card_of(repo=REPO))

    assert type(error) is kind, error.message
    assert REPO in error.message
    for word in words:
        assert word in error.message
    assert error.retryable is (kind is ModelUnavailable)


def test_weights_are_asked_for_with_the_installations_token_which_no_message_has(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    installation = Installation(hub_token=SecretStr("hf_sesame"))
    card = card_of(repo=REPO)

    replica = ModelReplica([card], installation=installation)
    (failure,) = replica._runtime.load_failures.values()

    assert hub.authorizations == {"Bearer hf_sesame"}
    assert "now there is no HF_TOKEN" not in failure.message
    assert "hf_sesame" not in f"{failure} {installation} {caplog.text}"


def test_a_hub_that_does_not_answer_is_tried_again_and_said_so(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.close()

    error = failure_of(card_of(repo=REPO))

    assert type(error) is ModelUnavailable
    assert "does not answer" in error.message
    assert [record.message for record in caplog.records].count(
        "weights were not fetched; it is tried again"
    ) == len(model_loader.RETRY_PAUSES_S)


def test_a_node_that_may_not_ask_the_hub_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    error = failure_of(card_of(repo=REPO))

    assert type(error) is ModelFailed, error.message
    assert "HF_HUB_OFFLINE forbids to fetch them; unset it once" in error.message
    assert hub.calls == 0


def test_a_refusal_of_the_hub_is_final_and_asked_for_once(hub: Hub) -> None:
    hub.status, hub.code = 403, "GatedRepo"
    failure_of(card_of(repo=REPO))
    asked = hub.calls

    loader = ModelLoader([card_of(repo=REPO)], {}, NoLoras(), gpu_share=0)
    loader.open_cache()
    with pytest.raises(ModelFailed, match="tried again by a request in"):
        loader.failures.check("broken")

    assert hub.calls == 2 * asked


def cut(folder: Path) -> None:
    file = max((folder / "transformer").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1000])


def garbled(folder: Path) -> None:
    (folder / "vae/config.json").write_text("{")


def missing(folder: Path) -> None:
    next((folder / "vae").glob("*.safetensors")).unlink()


def unindexed(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def unknown(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxSevenPipeline"}))


def unknown_part(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "FluxSevenTransformer"]
    (folder / "model_index.json").write_text(json.dumps(index))


def other_shapes(folder: Path) -> None:
    config = json.loads((folder / "vae/config.json").read_text())
    config["latent_channels"] = config.get("latent_channels", 4) + 1
    (folder / "vae/config.json").write_text(json.dumps(config))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / str(CARD.weights.path), tmp_path / "model"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, ["transformer/", ".safetensors is damaged or cut", "fetch it again"]),
        (garbled, ["vae/config.json is damaged or cut"]),
        (missing, ["vae"]),
        (unindexed, ["model_index.json is missing", "correct the path in the card"]),
        (unknown, ["FluxSevenPipeline", diffusers.__version__]),
        (unknown_part, ["FluxSevenTransformer"]),
        (other_shapes, ["shape"]),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(
    copied: Path, damage: Callable[[Path], None], words: list[str]
) -> None:
    damage(copied)

    error = failure_of(card_of(path=str(copied)))

    assert type(error) is ModelFailed, error.message
    for word in words:
        assert word in error.message


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    error = failure_of(card_of(path=str(tmp_path / "nowhere")))

    assert (type(error), "nowhere" in error.message) == (ModelFailed, True)


def test_an_address_without_a_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(weight_cache.MODEL_CACHE, str(tmp_path))

    error = failure_of(card_of(path="memory://bucket/nothing"))

    assert type(error) is ModelFailed
    assert "there is no folder at memory://bucket/nothing; put the files there" in error.message


def test_a_disk_that_is_too_small_is_named_with_the_bytes_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(weight_cache.MODEL_CACHE, str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/large/model_index.json", b" " * 3 * 2**20)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(weight_cache.shutil, "disk_usage", lambda _path: usage)
    try:
        error = failure_of(card_of(path="memory://bucket/large"))
    finally:
        memory.rm("/bucket", recursive=True)

    assert type(error) is ModelFailed
    assert f"(3 MiB needed, 1 MiB free in {tmp_path})" in error.message
    assert not list(tmp_path.rglob("*.json"))


def test_a_disk_that_fills_up_during_a_download_is_named_with_the_bytes(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", full)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "model_info",
        lambda *_args, **_options: hf_api.ModelInfo(
            id=REPO, siblings=[{"rfilename": "unet/a.safetensors", "size": 3 * 2**30}]
        ),
    )

    error = failure_of(card_of(repo=REPO))

    assert "3.0 GiB needed" in error.message
    assert "free in" in error.message


def test_a_lack_of_memory_stays_one() -> None:
    lack = MemoryError("no")

    assert explain(lack, Weights(path="x")) is lack
    assert explain(OutOfMemory("no"), Weights(path="x")).message == "no"  # type: ignore[attr-defined]


async def test_a_model_that_fails_leaves_the_others_of_its_replica_to_serve(copied: Path) -> None:
    cut(copied)
    whole = CARD.model_copy(update={"id": "whole", "serving": SERVING})
    replica = ModelReplica([card_of(path=str(copied)), whole])
    try:
        *_, refused = await events_of(replica, model="broken")
        *_, served = await events_of(replica, model="whole")
        before = await replica.status()
        *_, refused_again = await events_of(replica, model="broken")
        after = await replica.status()
        report = await replica.load_failures()
    finally:
        replica.__del__()

    assert isinstance(refused, Failed)
    assert (refused.kind, refused.retryable) == ("model_failed", False)
    assert "damaged or cut" in refused.message
    assert isinstance(served, Done)
    assert isinstance(refused_again, Failed)
    assert before["loaded_bytes"] == after["loaded_bytes"], "none makes way for a model that fails"
    assert report.keys() == {"broken"}
    assert report["broken"]["kind"] == "model_failed"


async def test_a_model_is_loaded_as_soon_as_its_operator_has_mended_it(copied: Path) -> None:
    index = (copied / "model_index.json").read_bytes()
    unindexed(copied)
    replica = ModelReplica([card_of(path=str(copied))])
    try:
        *_, refused = await events_of(replica, model="broken")
        (copied / "model_index.json").write_bytes(index)
        *_, served = await events_of(replica, model="broken")
        report = await replica.load_failures()
    finally:
        replica.__del__()

    assert isinstance(refused, Failed)
    assert isinstance(served, Done)
    assert report == {}


def test_a_replica_beside_others_that_serve_gives_up_to_them(copied: Path) -> None:
    cut(copied)

    with pytest.raises(ModelFailed, match="damaged or cut"):
        ModelReplica([card_of(path=str(copied))], others_serve=lambda: True)


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_a_failed_model_is_tried_again_after_pauses_that_double() -> None:
    clock = Clock()
    failures = LoadFailures(lambda _name: "same", clock)
    pauses = []
    for _ in range(8):
        failures.record("m", ModelFailed("no"))
        report = failures.report()["m"]
        pauses.append(report.retry_at - clock.now)
        with pytest.raises(ModelFailed, match="no"):
            failures.check("m")
        clock.now = report.retry_at
        failures.check("m")

    assert pauses == [10, 20, 40, 80, 160, 300, 300, 300]
    assert (report.since, report.tries) == (1_000.0, 8)
    failures.clear("m")
    assert failures.report() == {}


def test_what_only_the_network_kept_from_loading_is_tried_again_soon() -> None:
    clock = Clock()
    failures = LoadFailures(lambda _name: "same", clock)

    failures.record("m", ModelUnavailable("no network"))

    with pytest.raises(ModelUnavailable) as refused:
        failures.check("m")
    assert refused.value.retry_after_s == 2
    clock.now += 2
    failures.check("m")


def test_a_lack_of_memory_is_reported_but_may_have_passed_by_the_next_request() -> None:
    failures = LoadFailures(lambda _name: "same", Clock())

    failures.record("m", OutOfMemory("2.0 GiB needed"))

    failures.check("m")
    assert failures.report()["m"].message == "2.0 GiB needed"


def test_what_was_half_loaded_is_not_kept_by_its_error() -> None:
    class Weights:
        """Of a model that failed."""

    failures = LoadFailures(lambda _name: "same")
    kept: list[weakref.ref[Weights]] = []

    def load() -> None:
        weights = Weights()
        kept.append(weakref.ref(weights))
        raise ModelFailed("no")

    try:
        load()
    except ModelFailed as error:
        failures.record("m", error)
    gc.collect()

    assert failures.error_of("m") is not None
    assert kept[0]() is None


def test_a_bug_of_a_library_while_loading_is_a_failure_with_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(model_loader.ModelInstance, "__init__", broken)

    error = failure_of(CARD)

    assert type(error) is ModelFailed
    assert error.message == f"{CARD.id} cannot be loaded: ZeroDivisionError: by zero"


def test_a_new_token_lets_a_model_be_tried_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status, hub.code = 403, "GatedRepo"
    loader = ModelLoader([card_of(repo=REPO)], {}, NoLoras(), gpu_share=0)
    loader.open_cache()
    with pytest.raises(ModelFailed):
        loader.failures.check("broken")

    Path(constants.HF_TOKEN_PATH).write_text("hf_new")

    loader.failures.check("broken")
