"""The state of a stopped request: what the next replica has to know."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load, save

from deployments.pipelines.resume import Progress, RunningCall, capture, restore, size_bytes
from deployments.pipelines.scheduler_state import Tables, UnknownState, decode, encode
from tests.serving.fakes import resolved

ORIGIN = "weights and libraries"
STEPS = 4


def running(step: int, *, unproven: frozenset[str] = frozenset()) -> Progress:
    """A picture after so many steps of a call with a noise scheduler that has a history."""
    scheduler = diffusers.UniPCMultistepScheduler()
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(step)
    call = RunningCall(
        SimpleNamespace(scheduler=scheduler),
        [generator],
        {"UNet.forward": {"tuple": [{"dtype": "float32", "shape": [1, 4]}]}},
        Tables.of(scheduler),
    )
    latents = torch.randn(1, 4, generator=generator)
    for timestep in scheduler.timesteps[:step]:
        latents = scheduler.step(latents / 2, timestep, latents).prev_sample
    return Progress(step, latents if step else None, steps=STEPS, call=call, unproven=unproven)


def stored(*pictures: Progress) -> bytes:
    state = capture(pictures, ORIGIN)
    assert state is not None
    return state.to_bytes()


def several(count: int) -> Any:
    return resolved().model_copy(update={"num_images": count})


@pytest.mark.parametrize("unproven", [frozenset(), {"UNet.forward"}, {"A.forward", "B.forward"}])
def test_what_was_shared_without_a_proof_is_known_to_the_next_replica(unproven: frozenset[str]) -> None:
    (restored,) = restore(stored(running(2, unproven=unproven)), resolved(), ORIGIN) or []

    assert (restored.done, restored.unproven) == (2, unproven)


def test_the_state_has_everything_that_changes_from_step_to_step() -> None:
    picture = running(3)
    assert picture.call is not None
    before, generator = picture.call.pipeline.scheduler, picture.call.generators[0].get_state()

    (restored,) = restore(stored(picture), resolved(), ORIGIN) or []

    saved = restored.saved
    assert saved is not None
    fresh = diffusers.UniPCMultistepScheduler()
    fresh.set_timesteps(STEPS)
    values = {k: decode(v, lambda name, _: saved.tensors[name]) for k, v in saved.scheduler_values.items()}
    vars(fresh).update(values)
    assert fresh.step_index == 3
    assert fresh.timestep_list == before.timestep_list
    assert all(map(torch.equal, fresh.model_outputs, before.model_outputs))
    assert torch.equal(fresh.last_sample, before.last_sample)
    assert torch.equal(saved.tensors["latents"], picture.latents)
    assert torch.equal(saved.tensors["generator.0"], generator)
    assert (saved.step, saved.steps, saved.outputs) == (3, STEPS, picture.call.outputs)


def test_a_picture_without_a_step_starts_anew_beside_one_that_continues() -> None:
    restored = restore(stored(running(0), running(2), running(4)), several(3), ORIGIN)

    assert restored is not None
    assert [picture.done for picture in restored] == [0, 2, 4], "after its last step it is only decoded"
    assert capture([running(0)], ORIGIN) is None


def test_a_state_that_was_not_reached_yet_is_given_on() -> None:
    state = stored(running(2))
    restored = restore(state, resolved(), ORIGIN)

    assert restored is not None
    assert load(stored(*restored)).keys() == load(state).keys()
    assert size_bytes(restored) >= size_bytes([running(2)]) > 0


def test_a_noise_scheduler_with_an_unknown_value_has_no_state() -> None:
    picture = running(2)
    assert picture.call is not None
    picture.call.pipeline.scheduler.tree = object()

    assert capture([picture], ORIGIN) is None
    with pytest.raises(UnknownState):
        encode({"a": 1}, lambda _: "")


def changed(**about: Any) -> bytes:
    tensors = load(stored(running(2)))
    known = json.loads(bytes(tensors["about"].tolist()))
    tensors["about"] = torch.tensor(list(json.dumps(known | about).encode()), dtype=torch.uint8)
    return bytes(save(tensors))


def entry(**fields: Any) -> list[dict[str, Any]]:
    tensors = load(stored(running(2)))
    (known,) = json.loads(bytes(tensors["about"].tolist()))["pictures"]
    return [copy.deepcopy(known) | fields]


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"no safetensors",
        stored(running(2), running(2)),
        changed(origin="other weights"),
        changed(format=1),
        changed(pictures=[None]),
        changed(pictures=entry(other=1)),
        save({"about": torch.zeros(3, dtype=torch.uint8)}),
        save({"steps": torch.zeros(3)}),
    ],
    ids=["empty", "bytes", "pictures", "origin", "format", "nothing", "fields", "json", "old"],
)
def test_a_state_that_does_not_fit_lets_the_request_start_anew(state: bytes) -> None:
    assert restore(state, resolved(), ORIGIN) is None
    assert restore(changed(), resolved(), ORIGIN) is not None
