"""ModelReplica as a handle sees it, without Ray: the tiny model that ships, and events in order."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from deployments.protocol.card import load_card
from deployments.protocol.errors import BadRequest, ModelUnavailable
from deployments.protocol.events import (
    Artifact,
    Done,
    Event,
    Failed,
    Handover,
    Preview,
    Queued,
    Started,
    Step,
)
from deployments.protocol.installation import Installation
from deployments.protocol.request import Edit, GenerationRequest, Lora, OutputOptions
from deployments.replica import ModelReplica
from deployments.runtime import SWITCH_INTERVAL_S

CARD = load_card(Path(__file__).parents[2] / "configs/models/tiny-flux-schnell.yaml")
SMALL = {"width": 64, "height": 64}


@pytest.fixture(scope="module")
def model() -> Iterator[ModelReplica]:
    made = ModelReplica([CARD])
    yield made
    made.__del__()


def make_request(**changes: Any) -> GenerationRequest:
    return GenerationRequest(**({"model": CARD.id, "prompt": "a red circle", "seed": 5} | SMALL | changes))


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 40).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def pixels(data: bytes) -> npt.NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(data)), dtype=np.int16)


async def events_of(model: ModelReplica, /, **changes: Any) -> list[Event]:
    return [event async for event in model.generate(make_request(**changes))]


async def pictures_of(model: ModelReplica, /, **changes: Any) -> list[Artifact]:
    events = await events_of(model, **changes)
    return [event for event in events if isinstance(event, Artifact) and event.kind == "image"]


async def test_events_come_in_order_and_end_with_done(model: ModelReplica) -> None:
    events = await events_of(model)

    assert events[:2] == [Queued(0, 0.0), Started(4)]
    assert events[2:6] == [Step(step, 4) for step in (1, 2, 3, 4)]
    assert [(event.kind, event.index) for event in events[6:-1]] == [("image", 0), ("thumbnail", 0)]
    assert isinstance(events[-1], Done)
    assert events[-1].generation_s > 0


async def test_steps_and_the_end_say_how_many_device_seconds_a_request_took(model: ModelReplica) -> None:
    events = await events_of(model)

    seconds = [event.device_s for event in events if isinstance(event, Step | Done)]
    assert 0 < seconds[0] < seconds[-2] < seconds[-1], "the VAE's comes after the last step"
    assert seconds == sorted(seconds)
    assert isinstance(events[-1], Done)
    assert seconds[-1] < events[-1].generation_s


async def test_a_picture_comes_with_its_size_its_seed_and_how_it_was_made(model: ModelReplica) -> None:
    (picture,) = await pictures_of(model)

    assert (picture.width, picture.height, picture.seed) == (64, 64, 5)
    assert picture.metadata["prompt"] == "a red circle"
    assert picture.metadata["num_inference_steps"] == 4
    assert "Seed: 5" in Image.open(io.BytesIO(picture.data)).text["parameters"]


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
async def test_the_file_has_the_format_asked_for(model: ModelReplica, form: Any) -> None:
    (picture,) = await pictures_of(model, output=OutputOptions(format=form))

    assert picture.media_type == f"image/{form}"
    assert Image.open(io.BytesIO(picture.data)).format == form.upper()


@pytest.mark.parametrize("edit", [None, Edit(image=png()), Edit(image=png(), mask_image=png())])
async def test_picture_i_of_a_request_is_the_picture_of_seed_plus_i(
    model: ModelReplica, edit: Edit | None
) -> None:
    facts = {"edit": edit, "exact": "strict"}

    together = await pictures_of(model, num_images=3, seed=40, **facts)
    alone = [(await pictures_of(model, seed=seed, **facts))[0] for seed in (40, 41, 42)]

    assert [picture.seed for picture in together] == [40, 41, 42]
    assert [picture.metadata["seed"] for picture in together] == [40, 41, 42]
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(pixels(one.data), pixels(other.data))


LONG = "a red circle on a blue background, " * 12


async def test_a_prompt_that_is_too_long_is_warned_of_also_when_its_embeddings_are_cached(
    model: ModelReplica,
) -> None:
    answers = [(await events_of(model, prompt=LONG, seed=seed))[-1] for seed in (1, 2)]
    fits = (await events_of(model))[-1]

    for answer in answers:
        assert isinstance(answer, Done)
        (warning,) = answer.warnings
        assert (warning.code, warning.param, warning.of_result) == ("prompt_truncated", "prompt", True)
        assert "text_encoder_2 read 63 of" in warning.message
        assert warning.message.endswith(LONG.rstrip()[-40:] + '"')
    assert answers[0].warnings == answers[1].warnings  # type: ignore[union-attr]
    assert isinstance(fits, Done)
    assert fits.warnings == ()


def test_the_engine_waits_briefly_for_threads_that_run_python(model: ModelReplica) -> None:
    """At Python's own 5 ms, every operator of a step may wait so long while an adapter is read."""
    assert model is not None
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
    assert SWITCH_INTERVAL_S < 0.005 / 5


async def test_every_picture_is_followed_by_its_thumbnail(model: ModelReplica) -> None:
    events = await events_of(model, num_images=2)

    files = [(event.kind, event.index, event.seed) for event in events if isinstance(event, Artifact)]
    assert files == [("image", 0, 5), ("thumbnail", 0, 5), ("image", 1, 6), ("thumbnail", 1, 6)]


async def test_without_a_seed_every_request_draws_another(model: ModelReplica) -> None:
    (first,), (second,) = await pictures_of(model, seed=None), await pictures_of(model, seed=None)

    assert first.seed != second.seed


async def test_too_many_steps_are_reduced_here_too_because_handle_calls_skip_http(
    model: ModelReplica,
) -> None:
    events = await events_of(model, num_inference_steps=30)

    assert events[1] == Started(4)
    assert isinstance(events[-1], Done)
    assert [warning.code for warning in events[-1].warnings] == ["steps_corrected"]


@pytest.mark.parametrize("mask", [None, png()], ids=["img2img", "inpainting"])
async def test_an_edit_runs_its_part_of_the_steps_at_the_pictures_size(
    model: ModelReplica, mask: bytes | None
) -> None:
    edit = Edit(image=png((96, 64)), mask_image=mask, strength=0.75)

    events = await events_of(model, width=None, height=None, edit=edit)

    assert events[1:5] == [Started(3), Step(1, 3), Step(2, 3), Step(3, 3)]
    assert (events[5].width, events[5].height) == (96, 64)


async def test_started_has_the_steps_that_an_edit_really_runs(model: ModelReplica) -> None:
    events = await events_of(model, edit=Edit(image=png(), strength=0.3))

    steps = [event for event in events if isinstance(event, Step)]
    assert events[1] == Started(len(steps))


async def test_strength_zero_returns_the_picture(model: ModelReplica) -> None:
    (picture,) = await pictures_of(model, edit=Edit(image=png(), strength=0.0))

    assert np.array_equal(pixels(picture.data), pixels(png()))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"width": 100}, "width"),
        ({"width": 512, "height": 512}, "width"),
        ({"prompt": ""}, "prompt"),
        ({"num_images": 5}, "num_images"),
        ({"edit": Edit(image=b"no picture")}, "image"),
        ({"edit": Edit(image=png()[:-400])}, "image"),
        ({"edit": Edit(image=png(), mask_image=png()[:-400])}, "mask_image"),
    ],
    ids=str,
)
async def test_bad_input_is_one_failed_event_that_names_the_field(
    model: ModelReplica, changes: dict[str, Any], param: str
) -> None:
    events = await events_of(model, **changes)

    (failed,) = events
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.param, failed.retryable) == (BadRequest.kind, param, False)
    assert (await model.status())["active"] == 0


async def test_closing_the_stream_frees_the_slot(model: ModelReplica) -> None:
    stream = model.generate(make_request(num_images=4, width=128, height=128))
    first = await anext(stream)
    busy = await model.status()

    await stream.aclose()

    assert first == Queued(0, 0.0)
    assert (busy["active"], (await model.status())["active"]) == (1, 0)
    assert isinstance((await events_of(model))[-1], Done)


async def test_missing_weights_are_named_in_the_error() -> None:
    nowhere = CARD.weights.model_copy(update={"path": "models/nowhere"})

    model = ModelReplica([CARD.model_copy(update={"weights": nowhere})])
    (failed,) = await events_of(model)
    model.__del__()

    assert isinstance(failed, Failed)
    assert "models/nowhere: model_index.json is missing" in failed.message
    assert not failed.retryable


async def test_a_stopped_engine_fails_the_health_check_and_refuses_work() -> None:
    model = ModelReplica([CARD])
    model.check_health()

    model.__del__()

    with pytest.raises(ModelUnavailable):
        model.check_health()
    (failed,) = await events_of(model)
    assert isinstance(failed, Failed)
    assert failed.retryable


# --- previews, memory, several models, going on elsewhere --------------------------------------------------


async def test_previews_come_between_steps_and_show_what_the_picture_will_be(model: ModelReplica) -> None:
    events = await events_of(
        model, prompt="a red circle on a blue background", output=OutputOptions(previews=3)
    )

    previews = [event for event in events if isinstance(event, Preview)]
    finished = next(event for event in events if isinstance(event, Artifact))
    assert [preview.step for preview in previews] == [1, 2, 3]
    assert all(preview.media_type == "image/webp" for preview in previews)
    rough, picture = pixels(previews[-1].data), pixels(finished.data)
    assert rough.shape == picture.shape
    assert np.abs(rough - picture).mean() < 25, "of 255"


async def test_previews_change_nothing_in_the_picture(model: ModelReplica) -> None:
    with_previews = await pictures_of(model, output=OutputOptions(previews=2))
    without = await pictures_of(model)

    assert np.array_equal(pixels(with_previews[0].data), pixels(without[0].data))


async def test_equal_prompts_are_encoded_once(model: ModelReplica) -> None:
    async with model._runtime.models.using(CARD.id) as loaded:
        prompts = loaded.prompts
    before = prompts.hits, prompts.misses

    for seed in range(3):
        await pictures_of(model, prompt="two green stars of a kind", seed=seed)

    assert (prompts.hits - before[0], prompts.misses - before[1]) == (2, 1)
    assert 0 < prompts.bytes < 256 * 2**20


async def test_latents_that_are_not_finite_are_reported(
    model: ModelReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with model._runtime.models.using(CARD.id) as loaded:
        weight = loaded.pipelines._pipeline.transformer.proj_out.bias
    kept = weight.detach().clone()
    weight.data.fill_(float("nan"))
    try:
        events = await events_of(model)
    finally:
        weight.data.copy_(kept)

    assert isinstance(events[-1], Failed)
    assert "not finite" in events[-1].message


async def test_pixels_that_are_not_finite_are_reported_and_counted(model: ModelReplica) -> None:
    failures = model._runtime.worker.stats.failures
    before = failures.get("not_finite", 0)
    async with model._runtime.models.using(CARD.id) as loaded:
        weight = loaded.pipelines._pipeline.vae.decoder.conv_out.bias
    kept = weight.detach().clone()
    weight.data.fill_(float("nan"))
    try:
        events = await events_of(model)
    finally:
        weight.data.copy_(kept)

    assert isinstance(events[-1], Failed)
    assert "the VAE returned numbers that are not finite" in events[-1].message
    assert failures["not_finite"] == before + 1


async def test_a_replica_with_several_cards_loads_on_demand_and_unloads_the_oldest() -> None:
    serving = CARD.serving.model_copy(update={"models_loaded": 1, "warm_up": False})
    cards = [CARD.model_copy(update={"id": name, "serving": serving}) for name in ("first", "second")]
    replica = ModelReplica(cards)
    try:
        assert list(replica._runtime.models.loaded) == ["first"]
        (second,) = await pictures_of(replica, model="second")
        assert list(replica._runtime.models.loaded) == ["second"]
        (first,) = await pictures_of(replica, model="first")
        assert np.array_equal(pixels(first.data), pixels(second.data)), "the same weights, loaded again"
        status = await replica.status()
        assert status["models"] == ["first", "second"]
        strange = await events_of(replica, model="third")
        assert isinstance(strange[-1], Failed)
        assert "first, second" in strange[-1].message
    finally:
        replica.__del__()


async def test_a_drained_request_continues_elsewhere_with_the_same_picture(model: ModelReplica) -> None:
    card = CARD.model_copy(
        update={
            "steps": CARD.steps.model_copy(update={"max": 50}),
            "serving": CARD.serving.model_copy(update={"warm_up": False}),
        }
    )
    request = make_request(num_inference_steps=40, output=OutputOptions(format="png"))
    draining = ModelReplica([card])
    seen: list[Event] = []
    async for event in draining.generate(request):
        seen.append(event)
        if event == Step(5, 40):
            draining.drain(grace_s=0.0)
    draining.__del__()

    failed, handover = seen[-1], seen[-2]
    assert isinstance(failed, Failed)
    assert failed.retryable
    assert isinstance(handover, Handover)
    assert 5 <= handover.step < 40

    other = ModelReplica([card])
    resumed = [event async for event in other.generate(request, resume=handover.state)]
    whole = [event async for event in other.generate(request)]
    restarted = [event async for event in other.generate(request, resume=b"broken")]
    other.__del__()

    steps = [event.step for event in resumed if isinstance(event, Step)]
    assert steps == list(range(handover.step + 1, 41))
    pictures = [
        next(pixels(event.data) for event in events if isinstance(event, Artifact))
        for events in (resumed, whole, restarted)
    ]
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[1], pictures[2])


# --- routing by LoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("routed_by", "announced"), [("a" * 64, ["a" * 64]), ("b" * 64, []), ("", [])])
async def test_a_replica_announces_the_lora_by_which_a_request_was_routed_to_it(
    model: ModelReplica, monkeypatch: pytest.MonkeyPatch, routed_by: str, announced: list[str]
) -> None:
    known: list[str] = []

    async def announce(digest: str) -> str:
        known.append(digest)
        return digest

    monkeypatch.setattr("ray.serve.get_multiplexed_model_id", lambda: routed_by)
    monkeypatch.setattr(model, "_announce_lora", announce)

    await events_of(model, loras=(Lora(id="a" * 64),))

    assert known == announced


# --- the part of a GPU -------------------------------------------------------------------------------------


class RayContext:
    """What the process of a replica can ask Ray."""

    def __init__(self, gpus: float, actor_id: str | None = "0a") -> None:
        self._gpus = gpus
        self._actor_id = actor_id

    def get_actor_id(self) -> str | None:
        return self._actor_id

    def get_assigned_resources(self) -> dict[str, float]:
        assert self._actor_id is not None, "as Ray: only in a worker"
        return {"GPU": self._gpus, "CPU": 1.0}


def test_a_replica_can_be_made_in_a_process_that_only_calls_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get_runtime_context", lambda: RayContext(2.0, actor_id=None))
    serving = CARD.serving.model_copy(update={"warm_up": False})

    replica = ModelReplica([CARD.model_copy(update={"serving": serving})])

    replica.check_health()
    replica.__del__()


def test_a_replica_that_ray_gave_several_gpus_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get_runtime_context", lambda: RayContext(2.0))

    with pytest.raises(ModelUnavailable, match=r"ask for 2 GPUs.*num_gpus: 1"):
        ModelReplica([CARD])


def test_a_replica_whose_gpu_cannot_be_used_does_not_compute_on_the_cpu_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get_runtime_context", lambda: RayContext(1.0))
    serving = CARD.serving.model_copy(update={"warm_up": False})
    card = CARD.model_copy(update={"serving": serving})

    with pytest.raises(ModelUnavailable, match=r"Ray gave this replica a GPU.*driver.*MODEL_DEVICE=cpu"):
        ModelReplica([card])
    on_purpose = ModelReplica([card], installation=Installation(logical_gpus=True))

    on_purpose.check_health()
    on_purpose.__del__()
