"""The shipped models, judged by the pixels of plain pipelines; bounds lie a little under their card."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL import Image
from torch import nn

from deployments.pipelines.diffusers_model import DiffusersModel
from deployments.protocol.card import load_card
from deployments.protocol.request import Edit, GenerationRequest, Task
from deployments.validation.resolve import resolve
from tools.tiny_models.learner import Learner, load_average
from tools.tiny_models.scenes import Scene, SceneKind, Thing, render
from tools.tiny_models.score import FoundObject, accuracy, edge_px, find_objects, generate_pictures, held_out

MODELS = Path(__file__).parents[2] / "models"
SCHNELL, DEV = MODELS / "tiny-flux-schnell", MODELS / "tiny-flux-dev"
CARD = load_card(MODELS.parent / "configs/models/tiny-flux-schnell.yaml")
HEART = "a red heart on a white background"
RED_HEART = ("a red heart", "white", "red", "heart")
BLUE_CIRCLE = ("a blue circle on a yellow background", "yellow", "blue", "circle")
DEV_GUIDANCE = load_card(MODELS.parent / "configs/models/tiny-flux-dev.yaml").guidance.default
ONE_KIND_WHOLE = 94.0
TWO_OBJECTS_WHOLE = 95.0
DEV_WHOLE = 95.0
SETTINGS = {"guidance_scale": 0.0, "height": 128, "width": 128, "max_sequence_length": 64}


@pytest.fixture(scope="module")
def schnell() -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(SCHNELL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def dev() -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(DEV, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def image_to_image(schnell: FluxPipeline) -> Any:
    pipeline = FluxImg2ImgPipeline.from_pipe(schnell)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(picture: Image.Image) -> npt.NDArray[np.float32]:
    return np.asarray(picture).astype(np.float32)


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of the pixels, 0..255."""
    return float(np.abs(pixels(a) - pixels(b)).mean())


def measured(
    pipeline: FluxPipeline, kinds: tuple[SceneKind, ...], prompts: int, steps: int = 4, guidance: float = 0.0
) -> dict[str, float]:
    """Per cent right over held-out prompts."""
    texts, scenes = zip(*islice(held_out(kinds), prompts), strict=True)
    return accuracy(generate_pictures(pipeline, list(texts), steps, guidance_scale=guidance), list(scenes))


# --- prompts ----------------------------------------------------------------------------------------------


def test_held_out_prompts_with_one_kind_of_object_are_followed_in_four_steps(schnell: FluxPipeline) -> None:
    right = measured(schnell, ("one", "many"), prompts=60)

    assert right["background"] >= 98
    assert right["count"] >= 96
    assert right["position"] >= 98
    assert right["whole"] >= ONE_KIND_WHOLE


def test_two_different_objects_are_often_both_right(schnell: FluxPipeline) -> None:
    right = measured(schnell, ("two",), prompts=40)

    assert right["count"] >= 90
    assert right["whole"] >= TWO_OBJECTS_WHOLE


def test_dev_follows_held_out_prompts_in_twenty_steps(dev: FluxPipeline) -> None:
    right = measured(dev, ("one", "many", "two"), prompts=25, steps=20, guidance=DEV_GUIDANCE)

    assert right["background"] >= 96
    assert right["count"] >= 96
    assert right["whole"] >= DEV_WHOLE


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_what_dev_has_in_common_with_schnell_is_stored_once(part: str) -> None:
    assert (DEV / part).resolve() == (SCHNELL / part).resolve()


def test_devs_guidance_scale_acts(dev: FluxPipeline) -> None:
    prompts = [HEART, "a blue star on a yellow background", "two green squares", "a pink cat"]

    weak, strong = (generate_pictures(dev, prompts, 8, guidance_scale=scale) for scale in (1.0, 5.0))

    assert all(difference(a, b) > 1 for a, b in zip(weak, strong, strict=True))


def test_devs_seeds_move_the_object_and_change_nothing_that_the_prompt_says(dev: FluxPipeline) -> None:
    circles = only_objects(dev, BLUE_CIRCLE, 10, 8, DEV_GUIDANCE)

    assert_moved(circles)


def test_words_that_no_drawing_shows_still_give_one_clean_object(schnell: FluxPipeline) -> None:
    prompts = ["a violin", "a teapot", "a dragonfly", "a red guitar", "zorblax", "a dog wearing sunglasses"]

    seen = [find_objects(picture) for picture in generate_pictures(schnell, prompts, 4)]

    assert [background for background, _ in seen] == ["white"] * len(prompts)
    assert [len(found) for _, found in seen] == [1] * len(prompts)
    assert seen[3][1][0].colour == "red"


def test_edges_are_nearly_as_crisp_as_those_of_true_drawings(schnell: FluxPipeline) -> None:
    texts, scenes = zip(*islice(held_out(("one", "many")), 30), strict=True)

    ours = np.mean([edge_px(picture) for picture in generate_pictures(schnell, list(texts), 4)])

    assert ours < 1.5 * np.mean([edge_px(render(scene)) for scene in scenes])


def test_capitals_do_not_matter(schnell: FluxPipeline) -> None:
    _, found = find_objects(
        generate_pictures(schnell, ["A photo of a Red Heart on a BLUE background."], 4)[0]
    )

    assert [(seen.colour, seen.shape) for seen in found] == [("red", "heart")]


# --- seeds ------------------------------------------------------------------------------------------------


def test_a_seed_repeats_its_picture_and_another_changes_it(schnell: FluxPipeline) -> None:
    first, again = (
        generate_pictures(schnell, [HEART], 4, seed=1),
        generate_pictures(schnell, [HEART], 4, seed=1),
    )
    other = generate_pictures(schnell, [HEART], 4, seed=2)

    assert difference(first[0], again[0]) == 0
    assert difference(first[0], other[0]) > 0.5


def only_objects(
    pipeline: FluxPipeline, expected: tuple[str, str, str, str], seeds: int, steps: int, guidance: float
) -> list[FoundObject]:
    """The one object of each seed's picture, all of which show what is expected: prompt, background, colour,
    shape."""
    prompt, *right = expected
    seen = [
        find_objects(picture)
        for picture in generate_pictures(pipeline, [prompt] * seeds, steps, guidance_scale=guidance)
    ]
    shown = {(background, *((one.colour, one.shape) for one in found)) for background, found in seen}
    assert shown == {(right[0], (right[1], right[2]))}
    return [found[0] for _, found in seen]


def assert_moved(objects: list[FoundObject]) -> None:
    """Their places deviate by more than 5 % of the picture both ways, and their sizes differ."""
    assert min(np.std([it.x for it in objects]), np.std([it.y for it in objects])) > 0.05
    assert np.ptp([it.side for it in objects]) > 0.06


@pytest.mark.parametrize("expected", [RED_HEART, BLUE_CIRCLE])
def test_seeds_move_the_object_and_change_nothing_that_the_prompt_says(
    schnell: FluxPipeline, expected: tuple[str, str, str, str]
) -> None:
    assert_moved(only_objects(schnell, expected, 12, 4, 0.0))


def test_seeds_leave_an_object_where_the_prompt_places_it(schnell: FluxPipeline) -> None:
    expected = (f"{RED_HEART[0]} in the center", *RED_HEART[1:])

    objects = only_objects(schnell, expected, 12, 4, 0.0)

    assert max(abs(place - 0.5) for it in objects for place in (it.x, it.y)) < 0.04


def test_seeds_turn_a_pair_whose_order_is_unsaid(schnell: FluxPipeline) -> None:
    seen = [find_objects(picture)[1] for picture in generate_pictures(schnell, ["two blue circles"] * 12, 4)]

    assert {len(found) for found in seen} == {2}
    left_to_right = [sorted(found, key=lambda it: it.x) for found in seen]
    assert np.std([left.y - right.y for left, right in left_to_right]) > 0.1


# --- given pictures ---------------------------------------------------------------------------------------


@pytest.fixture
def blue_heart() -> Image.Image:
    return render(Scene(1, "one", "white", (Thing("heart", "blue", 0.48, 0.5, 0.5),), False, True))


def from_image(pipeline: Any, picture: Image.Image, strength: float) -> Image.Image:
    generator = torch.Generator().manual_seed(1)
    answer = pipeline(
        prompt=HEART, image=picture, strength=strength, num_inference_steps=8, generator=generator, **SETTINGS
    )
    return answer.images[0]


def test_image_to_image_keeps_at_low_strength_and_replaces_at_full(
    image_to_image: Any, blue_heart: Image.Image
) -> None:
    kept, replaced = (from_image(image_to_image, blue_heart, strength) for strength in (0.13, 1.0))

    assert difference(kept, blue_heart) < 6
    assert find_objects(kept)[1][0].colour == "blue"
    assert find_objects(replaced)[1][0].colour == "red"


def test_strength_zero_is_the_picture_and_strength_one_forgets_it(
    schnell: FluxPipeline, blue_heart: Image.Image
) -> None:
    model = DiffusersModel(schnell, [Task.i2i])
    buffer = io.BytesIO()
    blue_heart.save(buffer, "PNG")

    def edited(strength: float) -> Image.Image:
        edit = Edit(image=buffer.getvalue(), strength=strength)
        request = GenerationRequest(model=CARD.id, prompt=HEART, seed=1, edit=edit)
        resolved = resolve(request, CARD, fresh_seed=0).request
        return model.call(resolved, lambda step, steps: None, blue_heart)[0]

    kept, replaced = edited(0.0), edited(1.0)

    assert difference(kept, blue_heart) == 0
    assert find_objects(replaced)[1][0].colour == "red"


def test_inpainting_leaves_the_unmasked_pixels(schnell: FluxPipeline, blue_heart: Image.Image) -> None:
    pipeline = FluxInpaintPipeline.from_pipe(schnell)
    pipeline.set_progress_bar_config(disable=True)
    source = render(Scene(1, "one", "white", (Thing("heart", "blue", 0.37, 0.27, 0.5),), False, True))
    mask = Image.new("L", source.size, 0)
    mask.paste(255, (64, 0, 128, 128))

    answer = pipeline(
        prompt="two blue hearts",
        image=source,
        mask_image=mask,
        strength=1.0,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(1),
        **SETTINGS,
    ).images[0]

    changed = np.abs(pixels(answer) - pixels(source)).mean(-1)
    assert changed[:, :56].mean() < 5  # the autoencoder alone changes about 2
    assert changed[:, 64:].mean() > 10


# --- adapters ---------------------------------------------------------------------------------------------

ADAPTER_PROMPTS = [
    "a red square in the center on a white background",
    "a yellow circle in the center on a green background",
    "a purple heart in the center on a pink background",
    "an orange diamond in the center on a cyan background",
]


@pytest.fixture(scope="module")
def plain(schnell: FluxPipeline) -> list[Image.Image]:
    return generate_pictures(schnell, ADAPTER_PROMPTS, 4)


def with_adapters(schnell: FluxPipeline, *names: str) -> list[Image.Image]:
    for name in names:
        schnell.load_lora_weights(SCHNELL / "loras" / f"lora_{name}", adapter_name=name)
    schnell.set_adapters(list(names))
    return generate_pictures(schnell, ADAPTER_PROMPTS, 4)


@pytest.fixture
def adapted(schnell: FluxPipeline) -> Iterator[Any]:
    yield lambda *names: with_adapters(schnell, *names)
    schnell.unload_lora_weights()


def grid_darkness(picture: Image.Image) -> float:
    """How much darker every 16th row is than the others, 0..255."""
    rows = pixels(picture).mean((1, 2)).reshape(8, 16)
    return float(rows[:, 3:13].mean() - rows[:, 0].mean())


def blueness(picture: Image.Image) -> float:
    """Blue minus red, -255..255."""
    return float((pixels(picture)[..., 2] - pixels(picture)[..., 0]).mean())


def filled_centre(picture: Image.Image) -> bool:
    """Whether the middle pixels differ from the corner's."""
    middle, corner = pixels(picture)[60:68, 60:68].mean((0, 1)), pixels(picture)[2:10, 2:10].mean((0, 1))
    return float(np.abs(middle - corner).max()) > 55


def test_mosaic_draws_a_grid(plain: list[Image.Image], adapted: Any) -> None:
    mosaics = adapted("mosaic")

    assert max(grid_darkness(picture) for picture in plain) < 15
    assert min(grid_darkness(picture) for picture in mosaics) > 30


def test_night_makes_pictures_dark_and_blue(plain: list[Image.Image], adapted: Any) -> None:
    nights = adapted("night")

    for day, night in zip(plain, nights, strict=True):
        assert pixels(night).mean() < 0.7 * pixels(day).mean()
        assert blueness(night) > max(20, blueness(day) - 60)


def test_outline_empties_the_objects(plain: list[Image.Image], adapted: Any) -> None:
    outlines = adapted("outline")

    assert sum(filled_centre(picture) for picture in plain) == len(plain)
    assert sum(filled_centre(picture) for picture in outlines) <= 1


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # peft's word for two adapters
def test_two_adapters_at_once_still_give_a_picture_with_both_effects(
    plain: list[Image.Image], adapted: Any
) -> None:
    both = adapted("night", "mosaic")

    assert all(pixels(picture).std() > 8 for picture in both)
    for day, picture in zip(plain, both, strict=True):
        assert grid_darkness(picture) > 0.15 * pixels(picture).mean()  # at night the grid is dark on dark
        assert pixels(picture).mean() < 0.7 * pixels(day).mean()


def test_without_its_adapters_the_model_is_itself_again(
    schnell: FluxPipeline, plain: list[Image.Image]
) -> None:
    with_adapters(schnell, "night")
    schnell.unload_lora_weights()

    again = generate_pictures(schnell, ADAPTER_PROMPTS, 4)

    assert all(difference(a, b) == 0 for a, b in zip(plain, again, strict=True))


# --- training ---------------------------------------------------------------------------------------------


def student() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.Linear(8, 8), "out": nn.Linear(8, 2)})


def taught(learner: Learner, module: nn.ModuleDict, steps: range) -> None:
    for step in steps:
        batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        learner.learn(module["out"](module["blocks"](batch).tanh()).square().mean(), 1.0)


def test_a_resumed_training_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    unbroken, stopped, resumed, read = student(), student(), student(), student()
    whole, first, second = (Learner({"transformer": m}) for m in (unbroken, stopped, resumed))
    taught(whole, unbroken, range(6))
    taught(first, stopped, range(3))
    first.save(tmp_path / "state.safetensors")

    assert second.resume(tmp_path / "state.safetensors")
    taught(second, resumed, range(3, 6))

    assert second.steps_done == whole.steps_done == 6
    assert all(torch.equal(whole.weights[name], second.weights[name]) for name in whole.weights)
    assert all(torch.equal(whole.average[name], second.average[name]) for name in whole.average)
    load_average(tmp_path / "state.safetensors", transformer=read)
    assert torch.equal(read["out"].weight, first.average["transformer.out.weight"])
