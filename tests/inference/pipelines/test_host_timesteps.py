"""Noise schedulers that read their timesteps on the host give the bits that they gave before."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from deployments.pipelines import host_timesteps
from deployments.pipelines.host_timesteps import ON_DEVICE, look_up_on_host
from deployments.pipelines.noise_schedulers import SCHEDULERS, noise_scheduler, predicts_flow
from tests.inference import tiny

NOISE, FLOW = tiny.sdxl().scheduler, tiny.flux().scheduler
NAMES = ["auto", *SCHEDULERS]


def own(name: str) -> Any:
    return FLOW if name.startswith("flow_") else NOISE


def timesteps_of(scheduler: Any) -> Tensor:
    mu = {"mu": 1.0} if "mu" in inspect.signature(scheduler.set_timesteps).parameters else {}
    scheduler.set_timesteps(5, device="cpu", **(mu if predicts_flow(scheduler) else {}))
    return scheduler.timesteps


def sampled(scheduler: Any) -> Tensor:
    """A run of a model that answers with its input, scaled by the timestep; noise from seed 0."""
    generator = torch.Generator().manual_seed(0)
    takes = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in takes else {}
    x = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.bfloat16)
    for t in timesteps_of(scheduler):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = torch.tanh(scaled) * (1 - t / 2000)
        x = scheduler.step(output.to(x.dtype), t, x, **options, return_dict=False)[0].to(x.dtype)
    return x


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_gives_the_same_bits_with_its_timesteps_on_the_host(name: str) -> None:
    plain, changed = noise_scheduler(name, own(name)), noise_scheduler(name, own(name))
    look_up_on_host(changed)

    assert torch.equal(sampled(changed), sampled(plain))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_gets_the_value_on_the_host_of_the_timestep_that_it_is_given(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, given = noise_scheduler(name, own(name)), list[tuple[Any, Tensor]]()
    monkeypatch.setattr(
        type(scheduler),
        "step",
        lambda self, _output, timestep, _sample: given.append((timestep, self.timesteps)),
    )
    look_up_on_host(scheduler)
    on_device = timesteps_of(scheduler)

    for t in on_device[1:]:
        scheduler.step(torch.zeros(1), t, torch.zeros(1))

    storages = {id(timestep.untyped_storage()) for timestep, _ in given}
    assert storages == {id(table.untyped_storage()) for _, table in given}
    assert id(on_device.untyped_storage()) not in storages
    assert [float(timestep) for timestep, _ in given] == on_device[1:].tolist()
    assert scheduler.timesteps is on_device


def test_every_scheduler_that_requests_may_name_is_read_on_the_host() -> None:
    assert {kind for kind, _ in SCHEDULERS.values()} <= set(ON_DEVICE)


@pytest.mark.parametrize("kind", [kind for kind, placed in ON_DEVICE.items() if len(placed) > 1])
def test_a_scheduler_for_flow_places_on_the_device_what_the_table_says(kind: str) -> None:
    scheduler = getattr(diffusers, kind)()

    scheduler.set_timesteps(3, device="meta")

    placed = {name for name, value in vars(scheduler).items() if isinstance(value, Tensor) and value.is_meta}
    assert placed == set(ON_DEVICE[kind])


def test_a_copy_of_a_scheduler_has_timesteps_of_its_own() -> None:
    scheduler = noise_scheduler("ddim", NOISE)
    look_up_on_host(scheduler)
    timesteps_of(scheduler)

    probe = copy.deepcopy(scheduler)
    probe.set_timesteps(9)

    assert (len(scheduler.timesteps), len(probe.timesteps)) == (5, 9)


def test_timesteps_that_are_not_its_own_are_passed_on() -> None:
    scheduler = noise_scheduler("ddim", NOISE)
    look_up_on_host(scheduler)
    own_timesteps = timesteps_of(scheduler)
    known = vars(scheduler)["host_timesteps"]
    other, number = own_timesteps.clone()[1], 7

    assert known.of(other) is other
    assert known.of(number) == 7
    assert torch.equal(known.of(own_timesteps[1::2]), own_timesteps[1::2])


@pytest.mark.parametrize("count", [1, 3])
def test_noise_is_drawn_as_diffusers_draws_it(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[torch.device] = []
    monkeypatch.setattr(host_timesteps, "upload", lambda tensor, device: (uploaded.append(device), tensor)[1])
    scheduler = noise_scheduler("euler_a", NOISE)
    look_up_on_host(scheduler)
    draw = scheduler.step.__func__.__wrapped__.__globals__["randn_tensor"]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(count)]

    drawn = draw((count, 4, 2), generators(), torch.device("cuda"), torch.bfloat16)

    expected = [torch.randn(1, 4, 2, generator=one, dtype=torch.bfloat16) for one in generators()]
    assert torch.equal(drawn, torch.cat(expected))
    assert uploaded == [torch.device("cuda")]
