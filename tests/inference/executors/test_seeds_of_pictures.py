"""Picture k of a request is, bit for bit, the picture of its seed alone: in every family and task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    _get_task_class,
)
from PIL import Image

from deployments.engine.batch_buckets import pad_small_linears
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.engine.scheduled_job import ScheduledJob
from deployments.executors.inputs import Inputs
from deployments.executors.pipeline_calls import PipelineCalls
from deployments.executors.previews import PreviewReady
from deployments.executors.run import Run
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.pipelines.previews import Previewer
from deployments.pipelines.prompt_cache import PromptCache
from deployments.protocol.card import ModelCard, load_card
from deployments.protocol.events import Step
from deployments.protocol.request import Control, OutputOptions, ResolvedEdit, ResolvedRequest, Task
from tests.inference import tiny
from tests.inference.engine.together import Together
from tests.inference.families import FAMILIES
from tests.inference.tiny_controls import CONTROLS, flux_controlnets, unet_controlnets

CARD = load_card(Path(__file__).parents[3] / "configs/models/stable-diffusion-v1.5.yaml")
PICTURE = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 40).convert("RGB")
MASK = Image.new("L", (64, 64), 0)
MASK.paste(255, (0, 0, 32, 64))
TASKS: dict[str, dict[str, Any]] = {
    "t2i": {},
    "i2i": {"edit": ResolvedEdit(image=b"", strength=0.7)},
    "inpaint": {"edit": ResolvedEdit(image=b"", mask_image=b"", strength=0.8)},
    "strength 0": {"edit": ResolvedEdit(image=b"", strength=0.0)},
    "control": {"controls": (Control(image=b"", type="canny"),)},
    "ensemble": {"refiner": 0.5},
}
MAPPINGS = {"i2i": AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, "inpaint": AUTO_INPAINT_PIPELINES_MAPPING}
# families whose tiny pipelines need arguments that no request has, or that diffusers has no tasks of
SPECIAL = {"SDXL refiner", "FLUX.2 klein", "Sana", "PixArt-Sigma", "Lumina 2", "HiDream"}


def tasks_of(name: str, pipeline: Any) -> Iterator[str]:
    """The tasks for which diffusers has a pipeline of the family."""
    yield "t2i"
    for task, mapping in MAPPINGS.items():
        if (name, task) == ("Stable Diffusion 3", "inpaint"):
            continue  # needs latents of 16 channels
        try:
            _get_task_class(mapping, type(pipeline).__name__)
        except ValueError:
            continue
        yield task
    if name in ("FLUX.1-dev", "SDXL", "Stable Diffusion 1.5"):
        yield from ("strength 0", "control")
    if name == "SDXL":
        yield "ensemble"


@dataclass
class Loaded:
    """What a run needs of a loaded model."""

    pipelines: DiffusersModel
    prompts: PromptCache
    previewer: Previewer | None
    card: ModelCard


def built(name: str) -> Any:
    torch.manual_seed(0)
    pipeline = FAMILIES[name].build()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


def loaded(pipeline: Any, names: Sequence[str] = (), *, prompt_cache_bytes: int = 2**20) -> Loaded:
    nets: dict[str, Any] = {}
    if "control" in names:
        made = unet_controlnets(pipeline.unet) if hasattr(pipeline, "unet") else flux_controlnets()
        nets = {kind: net.float() for kind, net in made.items()}
    model = DiffusersModel(
        pipeline,
        {Task.t2i, *(Task(name) for name in names if name in MAPPINGS)},
        controls=CONTROLS,
        load_controlnet=lambda weights: nets[weights.path or ""],
        load_refiner=lambda: tiny.sdxl(seed=1),
    )
    return Loaded(model, PromptCache(prompt_cache_bytes), Previewer.fitted_to(pipeline), CARD)


@dataclass
class Played:
    """What became of one request in an engine."""

    pictures: list[npt.NDArray[np.uint8]]
    items: list[Any]  # that it emitted
    text_rows: int  # that text encoders computed
    rows: int  # that others did
    state: bytes | None = None  # for another replica
    restarted: bool = False  # though it had a state


def play(
    model: Loaded,
    request: ResolvedRequest,
    resume: bytes | None = None,
    stop_at: int | None = None,
    states: dict[int, bytes] | None = None,
) -> Played:
    """stop_at: finished steps at which the request is stopped with its state. states: gets that of each."""
    unused: Any = None
    model.pipelines.prepare(request)
    restore = intercept(model.pipelines.modules)
    unpad = pad_small_linears(model.pipelines.modules)
    try:
        edit = request.edit
        inputs = Inputs(
            PICTURE.resize((request.width, request.height)) if edit else None,
            MASK.resize((request.width, request.height)) if edit and edit.mask_image is not None else None,
            [PICTURE.resize((request.width, request.height)) for _ in request.controls],
            references=tuple(PICTURE for _ in request.references),
        )
        run = Run(request, model, unused, unused, resume=resume)  # type: ignore[arg-type]
        calls, items = PipelineCalls(run, inputs), list[Any]()
        engine = Engine(Together(8), exact="strict")
        with torch.inference_mode():
            fiber = Fiber(lambda: calls.work(items.append), ScheduledJob(batch_size=request.num_images))
            engine.start(fiber)
            text_rows = rows = 0
            while not engine.idle and calls.steps_done != stop_at:
                names = {f: f.call.seam.name for f in (fiber, *fiber.branches) if f.call is not None}
                before = engine.rows
                moved = engine.step()
                encodes = "Text" in names[moved[0]] or "T5" in names[moved[0]]
                text_rows += (engine.rows - before) * encodes
                rows += (engine.rows - before) * (not encodes)
                if states is not None and (captured := calls.capture()) is not None:
                    states[calls.steps_done] = captured.to_bytes()
            if stop_at is not None:
                captured = calls.capture()
                state = None if captured is None else captured.to_bytes()
                engine.cancel(fiber)
                return Played([], items, text_rows, rows, state)
            if fiber.failure is not None:
                raise fiber.failure
        pictures = [
            np.asarray(picture)
            for item in fiber.result
            for picture in (item.pictures() if hasattr(item, "pictures") else frames_of(item))
        ]
    finally:
        unpad()
        restore()
    return Played(pictures, items, text_rows, rows, restarted=calls.restarted)


def frames_of(item: Any) -> Iterator[Any]:
    """Of a video; a picture is returned as it is."""
    if not hasattr(item, "next_frames"):
        yield item
        return
    while (frames := item.next_frames()) is not None:
        yield frames


def request_of(name: str, task: str, **changes: Any) -> ResolvedRequest:
    facts: dict[str, Any] = {
        "model": CARD.id,
        "prompt": "a cat",
        "width": 64,
        "height": 64,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "seed": 11,
        "max_sequence_length": FAMILIES[name].common.get("max_sequence_length"),
        "exact": "strict",
    }
    return ResolvedRequest(**(facts | TASKS[task] | changes))


@pytest.mark.filterwarnings("default")  # of the libraries, about unusually small sizes
@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if FAMILIES[name].output == "images" and name not in SPECIAL]
)
def test_every_picture_of_a_request_is_that_of_its_seed_alone(name: str) -> None:
    pipeline = built(name)
    tasks = list(tasks_of(name, pipeline))
    model = loaded(pipeline, tasks)

    for task in tasks:
        together = play(model, request_of(name, task, num_images=3))
        alone = [play(model, request_of(name, task, seed=seed)) for seed in (11, 12, 13)]

        for index, one in enumerate(alone):
            assert np.array_equal(together.pictures[index], one.pictures[0]), f"{task}, picture {index}"
        if task != "strength 0":
            assert not np.array_equal(together.pictures[0], together.pictures[2]), task
        assert [item for item in together.items if isinstance(item, Step)] == [
            item for item in alone[0].items if isinstance(item, Step)
        ]


@pytest.mark.parametrize("prompt_cache_bytes", [0, 2**20])
def test_the_pictures_of_a_request_encode_its_prompt_once_and_share_every_step(
    prompt_cache_bytes: int,
) -> None:
    model = loaded(built("FLUX.1-dev"), prompt_cache_bytes=prompt_cache_bytes)

    one = play(model, request_of("FLUX.1-dev", "t2i", prompt="one"))
    four = play(model, request_of("FLUX.1-dev", "t2i", prompt="four", num_images=4))

    assert one.text_rows == four.text_rows == 2  # CLIP and T5
    assert four.rows == 4 * one.rows == 4 * (3 + 1)


@pytest.mark.parametrize(
    ("task", "scheduler", "steps", "at"),
    [
        ("t2i", "auto", 4, [1, 3]),
        ("t2i", "heun", 4, [2, 5]),  # of 7 calls of the model
        ("i2i", "auto", 10, [2, 5]),  # strength 0.7
        ("ensemble", "auto", 9, [3, 6]),
        ("t2i", "auto", 1, []),
    ],
)
def test_previews_come_at_even_distances_of_the_steps_that_run(
    task: str, scheduler: str, steps: int, at: list[int]
) -> None:
    model = loaded(built("SDXL"), ["t2i", "i2i"])
    request = request_of(
        "SDXL", task, scheduler=scheduler, num_inference_steps=steps, output=OutputOptions(previews=2)
    )

    played = play(model, request)

    assert [item.step for item in played.items if isinstance(item, PreviewReady)] == at


def test_previews_are_of_the_first_picture_and_as_many_as_one_picture_has() -> None:
    model = loaded(built("FLUX.1-dev"))
    output = OutputOptions(previews=2)

    played = play(model, request_of("FLUX.1-dev", "t2i", num_images=3, output=output))

    assert [item.step for item in played.items if isinstance(item, PreviewReady)] == [1, 2]


def test_a_stopped_request_of_several_pictures_continues_with_every_picture_where_it_was() -> None:
    model = loaded(built("FLUX.1-dev"))
    request = request_of("FLUX.1-dev", "t2i", num_images=2, num_inference_steps=6)
    whole = play(model, request)

    stopped = play(model, request, stop_at=2)
    assert stopped.state is not None
    continued = play(model, request, resume=stopped.state)

    assert stopped.items == [Step(1, 6), Step(2, 6)]
    assert continued.items == [Step(step, 6) for step in (3, 4, 5, 6)]
    assert all(map(np.array_equal, continued.pictures, whole.pictures))
