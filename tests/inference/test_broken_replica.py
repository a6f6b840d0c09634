"""A device that breaks under a replica, wherever it does: no request fails as a bug, and the replica ends."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments import replica as replica_module
from deployments.encoder import VideoEncoder
from deployments.loras.cache import LoraCache
from deployments.models import model_instance
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.protocol.card import load_card
from deployments.protocol.errors import ModelUnavailable
from deployments.protocol.events import Event, Failed, Handover
from deployments.protocol.request import GenerationRequest, Lora, Video
from deployments.replica import ModelReplica
from tests.inference import lora_files
from tests.patience import patience

CARDS_DIR = Path(__file__).parents[2] / "configs/models"
CARD = load_card(CARDS_DIR / "tiny-flux-schnell.yaml")
SERVING = CARD.serving.model_copy(update={"warm_up": False, "models_loaded": 2})
CARDS = [CARD.model_copy(update={"id": name, "aliases": [], "serving": SERVING}) for name in ("one", "two")]


def breaks(*_arguments: Any, **_options: Any) -> Any:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    error.error_code = 700  # type: ignore[attr-defined]
    raise error


class Ending:
    """What a replica calls to end its process."""

    def __init__(self) -> None:
        self.called = threading.Event()

    def __call__(self) -> None:
        self.called.set()


@pytest.fixture
def ending() -> Ending:
    return Ending()


@pytest.fixture
def replica(ending: Ending, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelReplica]:
    monkeypatch.setattr(replica_module, "LOST_GRACE_S", 0.0)
    monkeypatch.setattr(replica_module, "LOST_PAUSE_S", 0.0)
    made = ModelReplica(CARDS, end_process=ending)
    yield made
    made.__del__()


async def events_of(replica: ModelReplica, /, model: str = "one", **changes: Any) -> list[Event]:
    request = GenerationRequest(model=model, prompt="a red circle", width=64, height=64, seed=5, **changes)
    return [event async for event in replica.generate(request)]


def part(replica: ModelReplica, name: str) -> torch.nn.Module:
    """A part of the loaded model, such as vae.decoder."""
    (loaded,) = replica._runtime.models.models
    pipeline = loaded.pipelines._pipeline
    component, _, path = name.partition(".")
    found: torch.nn.Module = getattr(pipeline, component).get_submodule(path)
    return found


def a_lora(replica: ModelReplica) -> Lora:
    (loaded,) = replica._runtime.models.models
    file = lora_files.file_of(lora_files.random_lora(loaded.pipelines._pipeline, ["transformer"]))
    return Lora(id=hashlib.sha256(file).hexdigest(), file=file)


Break = Callable[[ModelReplica, pytest.MonkeyPatch], dict[str, Any]]  # returns what to request then


def in_a_denoising_step(replica: ModelReplica, _patch: pytest.MonkeyPatch) -> dict[str, Any]:
    part(replica, "transformer.x_embedder").register_forward_pre_hook(breaks)
    return {}


def in_the_text_encoder(replica: ModelReplica, _patch: pytest.MonkeyPatch) -> dict[str, Any]:
    part(replica, "text_encoder").register_forward_pre_hook(breaks)
    return {}


def while_the_picture_is_decoded(replica: ModelReplica, _patch: pytest.MonkeyPatch) -> dict[str, Any]:
    part(replica, "vae.decoder.conv_in").register_forward_pre_hook(breaks)
    return {}


def while_a_lora_is_copied(replica: ModelReplica, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(LoraCache, "_copy_to_device", breaks)
    return {"loras": (a_lora(replica),)}


def while_another_model_is_loaded(_replica: ModelReplica, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(model_instance, "load_pipeline", breaks)
    return {"model": "two"}


def while_a_part_is_loaded(_replica: ModelReplica, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(DiffusersModel, "prepare", breaks)
    return {}


@pytest.mark.parametrize(
    "happens",
    [
        in_a_denoising_step,
        in_the_text_encoder,
        while_the_picture_is_decoded,
        while_a_lora_is_copied,
        while_another_model_is_loaded,
        while_a_part_is_loaded,
    ],
)
async def test_a_device_that_breaks_is_the_replicas_end_and_no_failure_of_the_request(
    happens: Break, replica: ModelReplica, ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica.check_health()
    changes = happens(replica, monkeypatch)

    *before, failed = await events_of(replica, **changes)

    assert isinstance(failed, Failed)
    assert (failed.kind, failed.retryable) == (ModelUnavailable.kind, True)
    assert not any(isinstance(event, Handover) for event in before), "its retry counts: it may be the cause"
    with pytest.raises(ModelUnavailable, match="the device failed"):
        replica.check_health()
    assert ending.called.wait(patience())


async def test_requests_that_come_until_then_are_handed_back_and_do_not_count(
    replica: ModelReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    await events_of(replica, **in_a_denoising_step(replica, monkeypatch))

    handover, failed = await events_of(replica)

    assert handover == Handover(0, b"")
    assert isinstance(failed, Failed)
    assert failed.retryable


async def test_a_device_that_breaks_while_a_video_is_decoded_ends_the_replica(ending: Ending) -> None:
    wan = load_card(CARDS_DIR / "tiny-wan.yaml")
    serving = wan.serving.model_copy(update={"warm_up": False})
    replica = ModelReplica(
        [wan.model_copy(update={"serving": serving})], encoder=VideoEncoder(), end_process=ending
    )
    part(replica, "vae.decoder.conv_in").register_forward_pre_hook(breaks)
    request = GenerationRequest(model=wan.id, prompt="a red circle moves right", video=Video(), seed=5)

    events = [event async for event in replica.generate(request)]

    failed = events[-1]
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.retryable) == (ModelUnavailable.kind, True)
    with pytest.raises(ModelUnavailable, match="the device failed"):
        replica.check_health()
    replica.__del__()


async def test_a_replica_that_was_stopped_does_not_end_its_process(
    replica: ModelReplica, ending: Ending
) -> None:
    replica.__del__()

    with pytest.raises(ModelUnavailable):
        replica.check_health()

    assert not ending.called.is_set()
