"""A request that goes on elsewhere gives the same bits, whatever its step, pipeline and noise scheduler."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.noise_schedulers import SCHEDULERS
from deployments.pipelines.prompt_cache import PromptCache
from deployments.pipelines.replay import RESUMABLE
from deployments.protocol.events import Step
from deployments.protocol.request import OutputOptions, ResolvedRequest, ResolvedVideo, Task
from tests.inference import families
from tests.inference.executors.test_seeds_of_pictures import (
    CARD,
    TASKS,
    Loaded,
    Played,
    built,
    loaded,
    play,
    request_of,
    tasks_of,
)
from tests.inference.pipelines.test_video_families import hunyuan_from_a_picture

STEPS = 3
CONTROLLED = {
    "control i2i": TASKS["i2i"] | TASKS["control"],
    "control inpaint": TASKS["inpaint"] | TASKS["control"],
}
PICTURES = (
    *("FLUX.1-dev", "SDXL", "Stable Diffusion 1.5", "Stable Diffusion 3", "Qwen-Image", "Z-Image"),
    *("Chroma", "AuraFlow", "Ovis-Image"),
)
NOISE = [name for name in SCHEDULERS if not name.startswith("flow_")]
FLOW = ["flow_euler", "flow_unipc", "flow_dpmpp_2m"]  # that FLUX takes, without flow_lcm

pytestmark = pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes


@cache
def model_of(name: str) -> tuple[Loaded, tuple[str, ...]]:
    pipeline = built(name)
    tasks = tuple(task for task in tasks_of(name, pipeline) if task != "strength 0")
    if "control" in tasks:
        tasks += tuple(CONTROLLED)
    return loaded(pipeline, tasks), tasks


def states_of(model: Loaded, request: ResolvedRequest) -> tuple[Played, dict[int, bytes]]:
    """The undisturbed request, and its state after every step."""
    states: dict[int, bytes] = {}
    return play(model, request, states=states), states


def steps_of(played: Played) -> list[Step]:
    return [item for item in played.items if isinstance(item, Step)]


def assert_continues(model: Loaded, request: ResolvedRequest, whole: Played, step: int, state: bytes) -> None:
    rest = play(model, request, resume=state)
    assert not rest.restarted
    assert steps_of(rest) == steps_of(whole)[step:]
    assert len(rest.pictures) == len(whole.pictures)
    assert all(map(np.array_equal, rest.pictures, whole.pictures)), f"after step {step}"


def assert_continues_everywhere(model: Loaded, request: ResolvedRequest) -> None:
    whole, states = states_of(model, request)
    assert set(states) == set(range(1, len(steps_of(whole)) + 1)), "there is a state after every step"
    for step, state in states.items():
        assert_continues(model, request, whole, step, state)


@pytest.mark.parametrize("name", PICTURES)
def test_every_task_continues_after_every_step(name: str) -> None:
    model, tasks = model_of(name)

    for task in tasks:
        assert_continues_everywhere(model, picture_of(name, task, num_inference_steps=STEPS))


def picture_of(name: str, task: str, **changes: Any) -> ResolvedRequest:
    if task in CONTROLLED:
        return request_of(name, "t2i", **(CONTROLLED[task] | changes))
    return request_of(name, task, **changes)


@st.composite
def disturbed(draw: st.DrawFn) -> tuple[str, ResolvedRequest, float]:
    """A family, a request, and the share of its steps that are done when it is stopped."""
    name = draw(st.sampled_from(["FLUX.1-dev", "SDXL", "Stable Diffusion 1.5"]))
    task = draw(st.sampled_from(["t2i", "i2i"]))
    flow = FLOW if task == "t2i" else ["flow_euler"]  # diffusers' FLUX adds noise with no other
    changes = {
        "scheduler": draw(st.sampled_from(["auto", *(flow if name == "FLUX.1-dev" else NOISE)])),
        "num_inference_steps": draw(st.integers(3, 7)),
        "guidance_scale": draw(st.sampled_from([1.0, 3.0, 5.5])),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "num_images": draw(st.sampled_from([1, 1, 2])),
    }
    return name, picture_of(name, task, **changes), draw(st.floats(0, 1))


@settings(max_examples=10, deadline=None)
@given(disturbed())
def test_any_request_continues_after_any_step(case: tuple[str, ResolvedRequest, float]) -> None:
    name, request, share = case
    model, _ = model_of(name)

    whole, states = states_of(model, request)
    step = sorted(states)[min(int(share * len(states)), len(states) - 1)]

    assert_continues(model, request, whole, step, states[step])


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        *(("Stable Diffusion 1.5", name) for name in NOISE),
        *(("FLUX.1-dev", name) for name in FLOW),
        ("Stable Diffusion 3", "flow_heun"),
    ],
)
def test_every_noise_scheduler_continues_with_its_history(name: str, scheduler: str) -> None:
    model, _ = model_of(name)
    request = picture_of(name, "t2i", num_inference_steps=5, scheduler=scheduler)

    whole, states = states_of(model, request)

    for step in (1, 3):
        assert_continues(model, request, whole, step, states[step])


def wan_from_a_picture() -> Any:
    parts = dict(families.wan().components)
    config = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
    parts["transformer"] = diffusers.WanTransformer3DModel(**(config | {"in_channels": 36}))
    return diffusers.WanImageToVideoPipeline(**parts, image_processor=None, image_encoder=None)


VIDEOS: dict[str, tuple[Callable[[], Any], int, bool]] = {  # frames, from a picture
    "Wan": (families.wan, 5, False),
    "Wan 2.2 TI2V": (lambda: families.wan(expand_timesteps=True), 5, False),
    "Wan i2v": (wan_from_a_picture, 5, True),
    "LTX": (families.ltx, 9, False),
    "LTX i2v": (families.ltx, 9, True),
    "HunyuanVideo": (families.hunyuan_video, 25, False),
    "HunyuanVideo i2v": (lambda: hunyuan_from_a_picture("latent_concat"), 5, True),
    "HunyuanVideo i2v, second model": (lambda: hunyuan_from_a_picture("token_replace"), 21, True),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_continues_after_every_step(name: str) -> None:
    build, frames, from_picture = VIDEOS[name]
    torch.manual_seed(0)
    pipeline = build()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    model = Loaded(
        DiffusersModel(pipeline, {Task.i2v if from_picture else Task.t2v}), PromptCache(2**20), None, CARD
    )
    request = request_of("Wan", "i2i" if from_picture else "t2i").model_copy(
        update={
            "num_inference_steps": 3,
            "video": ResolvedVideo(num_frames=frames, fps=8, framewise=False),
            "max_sequence_length": 256,
            "width": 32,
            "height": 32,
        }
    )

    assert_continues_everywhere(model, request)


def test_a_scheduler_whose_noise_is_of_no_seed_starts_anew() -> None:
    model, _ = model_of("FLUX.1-dev")

    _, states = states_of(model, picture_of("FLUX.1-dev", "t2i", scheduler="flow_lcm"))

    assert states == {}


def test_previews_are_those_of_the_steps_that_are_left() -> None:
    model, _ = model_of("SDXL")
    request = picture_of("SDXL", "t2i", num_inference_steps=6, output=OutputOptions(format="png", previews=3))
    whole, states = states_of(model, request)

    rest = play(model, request, resume=states[3])

    def shown(played: Played) -> list[int]:
        return [item.step for item in played.items if hasattr(item, "previewer")]

    assert shown(whole) == [2, 3, 5]
    assert shown(rest) == [5]


def test_a_state_of_another_call_lets_the_request_start_anew() -> None:
    model, _ = model_of("SDXL")
    request = picture_of("SDXL", "t2i", num_inference_steps=4)
    whole = play(model, request)
    others = [
        states_of(model, picture_of("SDXL", "t2i", num_inference_steps=5))[1][2],  # steps
        states_of(model, picture_of("SDXL", "t2i", num_inference_steps=4, scheduler="ddim"))[1][2],
        states_of(model, picture_of("SDXL", "inpaint", num_inference_steps=5))[1][2],  # pipeline
    ]

    for state in others:
        again = play(model, request, resume=state)
        assert again.restarted
        assert steps_of(again) == steps_of(whole)
        assert np.array_equal(again.pictures[0], whole.pictures[0])


def test_a_request_that_is_stopped_again_before_it_got_to_its_state_keeps_it() -> None:
    model, _ = model_of("SDXL")
    request = picture_of("SDXL", "t2i", num_inference_steps=4)
    whole, states = states_of(model, request)

    stopped = play(model, request, resume=states[3], stop_at=3)

    assert stopped.state is not None
    assert_continues(model, request, whole, 3, stopped.state)


def test_pipelines_whose_loops_carry_more_are_not_listed() -> None:
    carry_more = {"CogVideoXPipeline", "LTX2Pipeline", "HunyuanImagePipeline", "HunyuanVideo15Pipeline"}

    assert all(hasattr(diffusers, name) for name in RESUMABLE | carry_more)
    assert RESUMABLE.isdisjoint(carry_more)
