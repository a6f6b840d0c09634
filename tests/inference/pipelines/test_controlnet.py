"""ControlNets, refine and the ensemble of experts: diffusers' own answer, alone and in any batch."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image
from torch import nn

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.intercept import intercept
from deployments.media.control import edge_map
from deployments.models.load import load_controlnet, load_pipeline
from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.protocol.card import ControlNet, ModelCard, Weights, load_cards
from deployments.protocol.errors import BadRequest, ModelFailed
from deployments.protocol.events import Artifact, Event, Failed, Step
from deployments.protocol.request import Control, GenerationRequest, ResolvedEdit, ResolvedRequest, Task
from deployments.replica import ModelReplica
from tests.inference import tiny
from tests.inference.engine.together import Together
from tests.inference.tiny_controls import (
    CONTROLS,
    LICENCE,
    flux_controlnet,
    flux_controlnets,
    unet_controlnet,
    unet_controlnets,
)

CPU = torch.device("cpu")
CARDS = load_cards(Path(__file__).parents[3] / "configs/models")
TOLERANCE = 1e-11  # of the largest latent
PICTURE = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 40).convert("RGB")
MASK = Image.new("L", (64, 64), 0)
MASK.paste(255, (0, 0, 32, 64))
EDGES = PICTURE.convert("L").point(lambda value: 255 if value > 60 else 0).convert("RGB")
RAMP = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
MAPS = {"canny": EDGES, "depth": RAMP}
EDITS = {
    Task.t2i: None,
    Task.i2i: ResolvedEdit(image=b"", strength=0.7),
    Task.inpaint: ResolvedEdit(image=b"", mask_image=b"", strength=0.9),
}


def canny(**changes: Any) -> Control:
    return Control(image=b"", type="canny", **changes)


def depth(**changes: Any) -> Control:
    return Control(image=b"", type="depth", **changes)


def make_request(task: Task = Task.t2i, **changes: Any) -> ResolvedRequest:
    facts = {
        "model": "tiny",
        "prompt": "a fox",
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "seed": 5,
        "max_sequence_length": None,
        "edit": ResolvedEdit(image=b"", strength=0.5) if task is Task.refine else EDITS[task],
        "refine": task is Task.refine,
    }
    return ResolvedRequest(**(facts | changes))


def refiner() -> StableDiffusionXLImg2ImgPipeline:
    return tiny.sdxl_refiner().to(dtype=torch.float64)


def model_of(pipeline: Any, nets: dict[str, nn.Module], **parts: Any) -> DiffusersModel:
    """A model in float64 whose ControlNets are these."""
    return DiffusersModel(
        pipeline.to(dtype=torch.float64),
        tiny.IMAGE_TASKS,
        controls=CONTROLS,
        load_controlnet=lambda weights: nets[weights.path or ""],
        **parts,
    )


NETS: dict[str, dict[str, nn.Module]] = {
    "sd": unet_controlnets(tiny.sd().unet),
    "sdxl": unet_controlnets(tiny.sdxl().unet),
    "flux": flux_controlnets(),
}


@pytest.fixture(scope="module")
def sd() -> DiffusersModel:
    return model_of(tiny.sd(), NETS["sd"])


@pytest.fixture(scope="module")
def sdxl() -> DiffusersModel:
    return model_of(tiny.sdxl(), NETS["sdxl"], load_refiner=refiner)


@pytest.fixture(scope="module")
def flux() -> DiffusersModel:
    return model_of(tiny.flux(), NETS["flux"])


@pytest.fixture
def model(request: pytest.FixtureRequest) -> DiffusersModel:
    """The model that a test's parameter names."""
    return request.getfixturevalue(request.param)


every_family = pytest.mark.parametrize("model", ["flux", "sdxl", "sd"], indirect=True)


def ignore(_step: int, _steps: int) -> None:
    pass


def latents(
    model: DiffusersModel, request: ResolvedRequest, on_step: Callable[[int, int], None] = ignore
) -> torch.Tensor:
    """The request's final latents."""
    image = PICTURE if request.edit else None
    mask = MASK if request.task is Task.inpaint else None
    maps = [MAPS[control.type] for control in request.controls]
    with torch.inference_mode():
        return torch.stack(model.call(request, on_step, image, mask, maps, output_type="latent"))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


# --- what diffusers itself answers ------------------------------------------------------------------------

PLAIN = {
    "sd": StableDiffusionControlNetPipeline,
    "sdxl": StableDiffusionXLControlNetPipeline,
    "flux": FluxControlNetPipeline,
}


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize(
    "controls",
    [
        (canny(),),
        (canny(weight=0.35, start=0.25, end=0.75),),
        (canny(weight=0.6), depth(weight=1.7)),
        (depth(weight=0.0), canny(weight=0.5, end=0.5), depth(start=0.5)),
    ],
    ids=["one", "weighted part", "two", "three with one off"],
)
def test_controlled_pictures_equal_those_of_the_diffusers_pipeline(
    family: str, controls: tuple[Control, ...], request: pytest.FixtureRequest
) -> None:
    model: DiffusersModel = request.getfixturevalue(family)
    wanted = make_request(controls=controls, num_images=2)
    model.prepare(wanted)
    parts = model.pipeline_for(make_request()).components
    plain = PLAIN[family](**parts, controlnet=[NETS[family][control.type] for control in controls])
    plain.set_progress_bar_config(disable=True)
    picture = "control_image" if family == "flux" else "image"

    with torch.inference_mode():
        expected = plain(
            prompt="a fox",
            width=64,
            height=64,
            num_inference_steps=4,
            guidance_scale=3.0,
            num_images_per_prompt=2,
            generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
            output_type="latent",
            controlnet_conditioning_scale=[c.weight for c in controls],
            control_guidance_start=[c.start for c in controls],
            control_guidance_end=[c.end for c in controls],
            **{picture: [MAPS[c.type] for c in controls]},
        ).images

    assert error(latents(model, wanted), expected) <= TOLERANCE


def test_a_union_net_gets_the_mode_of_each_control_picture() -> None:
    union = flux_controlnet(6, num_mode=3)
    entries = {
        kind: ControlNet(weights=CONTROLS["canny"].weights, mode=mode, licence=LICENCE)
        for kind, mode in UNION
    }
    model = DiffusersModel(
        tiny.flux().to(dtype=torch.float64), [Task.t2i], controls=entries, load_controlnet=lambda _: union
    )
    wanted = make_request(controls=(canny(weight=0.8), depth(weight=0.5)))
    plain = FluxControlNetPipeline(**model.pipeline_for(make_request()).components, controlnet=[union, union])
    plain.set_progress_bar_config(disable=True)

    with torch.inference_mode():
        expected = plain(
            prompt="a fox",
            width=64,
            height=64,
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(5)],
            output_type="latent",
            controlnet_conditioning_scale=[0.8, 0.5],
            control_image=[EDGES, RAMP],
            control_mode=[0, 2],
        ).images

    assert error(latents(model, wanted), expected) <= TOLERANCE
    assert (
        error(latents(model, make_request(controls=(canny(weight=0.8), canny(weight=0.5)))), expected) > 1e-6
    )


UNION = (("canny", 0), ("depth", 2))


@pytest.mark.parametrize("scheduler", ["auto", "euler_a", "heun", "dpmpp_2m_karras"])
def test_the_ensemble_is_diffusers_base_and_refiner_one_after_the_other(
    sdxl: DiffusersModel, scheduler: str
) -> None:
    wanted = make_request(refiner=0.6, num_inference_steps=7, scheduler=scheduler, negative_prompt="grey")
    steps_seen: list[tuple[int, int]] = []

    got = latents(sdxl, wanted, lambda step, steps: steps_seen.append((step, steps)))

    base, second = sdxl.pipeline_for(make_request(scheduler=scheduler)), refiner()
    second.set_progress_bar_config(disable=True)
    second.scheduler = sdxl.pipeline_for(make_request(scheduler=scheduler)).scheduler
    generator = [torch.Generator().manual_seed(5)]
    counted: list[int] = []

    def count(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        counted.append(step)
        return tensors

    shared = {
        "prompt": "a fox",
        "negative_prompt": "grey",
        "num_inference_steps": 7,
        "guidance_scale": 3.0,
        "generator": generator,
        "output_type": "latent",
        "callback_on_step_end": count,
    }
    with torch.inference_mode():
        half = base(**shared, width=64, height=64, denoising_end=0.6).images
        expected = second(**shared, image=half, denoising_start=0.6).images
    assert error(got, expected) <= TOLERANCE
    assert steps_seen == [(step, len(counted)) for step in range(1, len(counted) + 1)]


def test_refine_is_image_to_image_with_the_refiners_weights() -> None:
    model = DiffusersModel(refiner(), [Task.refine, Task.i2i])

    refined = latents(model, make_request(Task.refine))

    assert (
        error(refined, latents(model, make_request(Task.i2i, edit=ResolvedEdit(image=b"", strength=0.5))))
        == 0
    )


# --- in one batch -----------------------------------------------------------------------------------------


def run_together(
    models: list[DiffusersModel], works: list[Callable[[], torch.Tensor]]
) -> tuple[list[torch.Tensor], Engine]:
    """What each piece of work gives when all run at once, and the engine that ran them."""
    engine = Engine(Together(max_batch_size=64))
    restore = intercept([module for model in models for module in model.modules])
    try:
        with torch.inference_mode():
            fibers = [Fiber(work) for work in works]
            for fiber in fibers:
                engine.start(fiber)
            while not engine.idle:
                engine.step()
    finally:
        restore()
    for fiber in fibers:
        if fiber.failure is not None:
            raise fiber.failure
    return [fiber.result for fiber in fibers], engine


def assert_same_together_as_alone(requests: list[tuple[DiffusersModel, ResolvedRequest]]) -> Engine:
    works = [lambda model=model, request=request: latents(model, request) for model, request in requests]
    alone = [work() for work in works]
    models = list({id(model): model for model, _ in requests}.values())

    together, engine = run_together(models, works)

    for (_, request), got, expected in zip(requests, together, alone, strict=True):
        assert error(got, expected) <= TOLERANCE, request
    assert engine.rows > 1.3 * engine.forwards, "forwards must really be shared"
    return engine


CONTROLLED: list[dict[str, Any]] = [
    {"task": Task.t2i},
    {"task": Task.i2i, "seed": 6},
    {"task": Task.inpaint, "seed": 7},
    {"task": Task.t2i, "controls": (canny(),), "seed": 8},
    {"task": Task.t2i, "controls": (canny(weight=0.4, end=0.5),), "seed": 9, "num_images": 2},
    {"task": Task.t2i, "controls": (depth(weight=1.5), canny(weight=0.6, start=0.3)), "seed": 10},
    {"task": Task.i2i, "controls": (canny(weight=0.7),), "seed": 11, "num_inference_steps": 6},
    {"task": Task.inpaint, "controls": (canny(), depth(weight=0.5)), "seed": 12},
]


@every_family
def test_controlled_and_plain_requests_of_all_tasks_share_forwards_and_equal_each_alone(
    model: DiffusersModel,
) -> None:
    assert_same_together_as_alone([(model, make_request(**changes)) for changes in CONTROLLED])


def test_ensemble_refine_and_control_share_forwards_and_equal_each_alone(
    sdxl: DiffusersModel,
) -> None:
    refine = DiffusersModel(refiner(), [Task.refine])
    plain = [(sdxl, make_request(**changes)) for changes in CONTROLLED[2:7:2]]
    both = [
        (sdxl, make_request(refiner=0.5, seed=20 + n, scheduler=s)) for n, s in enumerate(["auto", "euler_a"])
    ]
    controlled = (sdxl, make_request(refiner=0.75, controls=(canny(weight=0.5),), num_inference_steps=6))
    refined = [(refine, make_request(Task.refine, seed=seed)) for seed in (1, 2)]

    assert_same_together_as_alone([*plain, *both, controlled, *refined])


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_random_mixtures_equal_each_alone(family: str, request: pytest.FixtureRequest) -> None:
    model: DiffusersModel = request.getfixturevalue(family)
    rng = random.Random(family)
    for _ in range(2):
        requests = [
            make_request(
                rng.choice([Task.t2i, Task.i2i, Task.inpaint]),
                controls=tuple(
                    Control(
                        image=b"",
                        type=rng.choice(["canny", "depth"]),
                        weight=rng.choice([0.0, 0.3, 1.0, 2.0]),
                        start=rng.choice([0.0, 0.4]),
                        end=rng.choice([0.6, 1.0]),
                    )
                    for _ in range(rng.choice([0, 1, 1, 2]))
                ),
                seed=rng.randrange(2**40),
                num_inference_steps=rng.choice([2, 4, 5]),
                guidance_scale=rng.choice([1.0, 3.0, 7.5]),
            )
            for _ in range(6)
        ]
        assert_same_together_as_alone([(model, wanted) for wanted in requests])


@every_family
def test_requests_of_different_weights_share_every_forward_of_a_net(model: DiffusersModel) -> None:
    pair = [
        make_request(controls=(canny(weight=weight),), seed=seed) for weight, seed in ((0.3, 1), (1.6, 2))
    ]
    model.prepare(pair[0])

    engine = assert_same_together_as_alone([(model, wanted) for wanted in pair])

    assert engine.rows == 2 * engine.forwards * rows_per_picture(model)


def rows_per_picture(model: DiffusersModel) -> float:
    """Rows of a solo request over its forwards, which two of a kind double."""
    _, engine = run_together([model], [lambda: latents(model, make_request(controls=(canny(),)))])
    return engine.rows / engine.forwards


@every_family
def test_a_net_does_not_run_outside_of_its_span(model: DiffusersModel) -> None:
    def forwards(**changes: Any) -> int:
        _, engine = run_together(
            [model], [lambda: latents(model, make_request(controls=(canny(**changes),)))]
        )
        return engine.forwards

    assert forwards() - forwards(end=0.5) == 2  # of four steps
    assert forwards() - forwards(weight=0.0) == 4


# --- loading ----------------------------------------------------------------------------------------------


def test_nets_and_refiner_are_loaded_once_and_their_modules_registered() -> None:
    loaded: list[str] = []
    nets = NETS["sdxl"]

    def load(weights: Weights) -> nn.Module:
        loaded.append(weights.path or "")
        return nets[weights.path or ""]

    model = DiffusersModel(
        tiny.sdxl().to(dtype=torch.float64),
        [Task.t2i],
        controls=CONTROLS,
        load_controlnet=load,
        load_refiner=refiner,
    )
    registered: list[list[nn.Module]] = []
    model.on_new_modules = lambda _need, modules: registered.append(modules)
    before = list(model.modules)

    for wanted in (
        make_request(),
        make_request(controls=(canny(), canny())),
        make_request(controls=(canny(),), refiner=0.5),
    ):
        model.prepare(wanted)
        model.prepare(wanted)

    assert loaded == ["canny"]
    assert [[type(module).__name__ for module in modules] for modules in registered] == [
        ["ControlNetModel"],
        ["UNet2DConditionModel"],  # text encoder and VAE are the base's own
    ]
    assert model.modules == [*before, *registered[0], *registered[1]]


def test_many_threads_that_need_a_net_load_it_once() -> None:
    loaded: list[Weights] = []
    started = threading.Barrier(4)

    def load(weights: Weights) -> nn.Module:
        loaded.append(weights)
        return NETS["sd"]["canny"]

    model = DiffusersModel(tiny.sd(), [Task.t2i], controls={"canny": CONTROLS["canny"]}, load_controlnet=load)

    def prepare() -> None:
        started.wait()
        model.prepare(make_request(controls=(canny(),)))

    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("changes", "says", "param"),
    [
        ({"controls": (canny(),)}, "takes no control picture of type canny", "control_type"),
        ({"refiner": 0.8}, "has no refiner", "refiner"),
    ],
)
def test_controls_and_refiners_that_a_model_lacks_are_refused(
    changes: dict[str, Any], says: str, param: str
) -> None:
    with pytest.raises(BadRequest, match=says) as caught:
        DiffusersModel(tiny.sd(), [Task.t2i]).prepare(make_request(**changes))

    assert caught.value.param == param


@pytest.mark.parametrize(("start", "idle"), [(0.001, "the model"), (0.999, "the refiner")])
def test_an_ensemble_that_leaves_one_without_a_step_is_refused(
    sdxl: DiffusersModel, start: float, idle: str
) -> None:
    with pytest.raises(BadRequest, match=f"leave none for {idle}") as caught:
        latents(sdxl, make_request(refiner=start))

    assert caught.value.param == "refiner"


# --- weights on disk --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with its refiner and a ControlNet, as a card finds them."""
    folder = tmp_path_factory.mktemp("weights")
    tiny.sdxl().save_pretrained(folder / "base")
    refiner().to(dtype=torch.float32).save_pretrained(folder / "refiner")
    unet_controlnet(tiny.sdxl().unet, 3).float().save_pretrained(folder / "canny")
    flux_controlnet(1).float().save_pretrained(folder / "flux")
    return folder


def weights_in(folder: Path, name: str, dtype: Any = "float32") -> Weights:
    return Weights(path=str(folder / name), dtype=dtype)


def test_a_controlnet_is_loaded_in_the_cards_dtype_by_its_own_class(folder: Path) -> None:
    net = load_controlnet(weights_in(folder, "canny", "bfloat16"), CPU)
    flux_net = load_controlnet(weights_in(folder, "flux"), CPU)

    assert (type(net), type(flux_net)) == (ControlNetModel, FluxControlNetModel)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.bfloat16}
    assert not net.training


def test_loading_during_requests_does_not_change_the_default_dtype_of_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", set_to.append)

    loaded = load_pipeline(weights_in(folder, "refiner", "bfloat16"), CPU)
    load_controlnet(weights_in(folder, "canny", "bfloat16"), CPU)

    assert set_to == []
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder_2.dtype} == {torch.bfloat16}


def test_a_controlnet_whose_files_are_missing_is_named(folder: Path) -> None:
    with pytest.raises(ModelFailed, match=r"nowhere: config\.json is missing"):
        load_controlnet(weights_in(folder, "nowhere"), CPU)


def test_what_is_no_controlnet_is_refused(folder: Path) -> None:
    with pytest.raises(ModelFailed, match="is a UNet2DConditionModel, which is no ControlNet"):
        load_controlnet(weights_in(folder, "base/unet"), CPU)


# --- the whole replica ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[ModelReplica]:
    """A replica with ControlNets for edges and depth, none that finds depth, and a refiner."""
    facts = CARDS["sdxl-base-1.0"].model_dump() | {"serving": {"num_cpus": 1, "num_gpus": 0}}
    sizes = {"width": 64, "height": 64, "min": 64, "max": 128, "max_pixels": 16384}
    net = {"weights": weights_in(folder, "canny"), "licence": LICENCE}
    base = ModelCard.model_validate(
        facts
        | {"weights": weights_in(folder, "base"), "sizes": sizes, "controls": {"canny": net, "depth": net}}
    )
    second = CARDS["sdxl-refiner-1.0"].model_copy(update={"weights": weights_in(folder, "refiner")})
    model = ModelReplica([base], {base.id: second})
    yield model
    model.__del__()


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


async def events_of(model: ModelReplica, **changes: Any) -> list[Event]:
    facts = {"model": "sdxl", "prompt": "a fox", "seed": 5, "num_inference_steps": 5}
    return [event async for event in model.generate(GenerationRequest(**(facts | changes)))]


def picture_in(events: list[Event]) -> npt.NDArray[np.int16]:
    (artifact,) = [event for event in events if isinstance(event, Artifact) and event.kind == "image"]
    return np.asarray(Image.open(io.BytesIO(artifact.data)), dtype=np.int16)


async def test_control_and_refiner_run_from_request_to_file(served: ModelReplica) -> None:
    plain = await events_of(served)
    photo = Control(image=png(PICTURE.resize((96, 64))), type="canny")
    edges = Control(image=png(edge_map(PICTURE.resize((96, 64)))), type="canny")

    controlled = await events_of(served, controls=[photo])
    by_map = await events_of(served, controls=[edges])
    refined = await events_of(served, refiner=0.6, width=64, height=64)

    assert picture_in(controlled).shape == (64, 96, 3)
    assert np.array_equal(picture_in(controlled), picture_in(by_map))
    assert not np.array_equal(picture_in(refined), picture_in(plain))
    assert [event.step for event in refined if isinstance(event, Step)] == [1, 2, 3, 4, 5]


async def test_metadata_contains_the_control_without_its_picture(served: ModelReplica) -> None:
    control = Control(image=png(EDGES), type="canny", weight=0.5)

    events = await events_of(served, controls=[control], refiner=0.6)

    (artifact,) = [event for event in events if isinstance(event, Artifact) and event.kind == "image"]
    assert artifact.metadata["controls"] == [
        {"type": "canny", "weight": 0.5, "start": 0.0, "end": 1.0, "is_map": None}
    ]
    text = Image.open(io.BytesIO(artifact.data)).text["parameters"]
    assert 'ControlNet 0: "Module: canny, Weight: 0.5, Guidance Start: 0, Guidance End: 1"' in text
    assert "Refiner switch at: 0.6" in text


@pytest.mark.parametrize(
    ("changes", "says", "param"),
    [
        ({"controls": [Control(image=png(PICTURE), type="depth")]}, "send a depth map", "control_image"),
        ({"controls": [Control(image=png(PICTURE), type="pose")]}, "it takes canny, depth", "control_type"),
        (
            {"controls": [Control(image=png(PICTURE)[:-300], type="canny")]},
            "control_image is damaged",
            "control_image",
        ),
        ({"refiner": 0.9999}, "leave none for the refiner", "refiner"),
    ],
)
async def test_an_unsupported_request_is_one_failed_event_that_names_the_field(
    served: ModelReplica, changes: dict[str, Any], says: str, param: str
) -> None:
    events = await events_of(served, **changes)

    assert isinstance(events[-1], Failed)
    assert says in events[-1].message
    assert (events[-1].kind, events[-1].param) == ("bad_request", param)
