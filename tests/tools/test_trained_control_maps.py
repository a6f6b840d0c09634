"""The maps that the tiny ControlNets learn from: they show what the scene has, as the service draws them."""

from __future__ import annotations

import io
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from deployments.media.control import control_map
from deployments.protocol.request import Control
from tools.tiny_models.control_maps import FIGURE, canny, depth, pose
from tools.tiny_models.controlnet import MAPS, ControlKind, free_scene, vague_caption
from tools.tiny_models.scenes import PICTURE_PX, SHAPES, Scene, Thing, render, silhouette

LARGE = Thing("circle", "red", 0.4, 0.3, 0.3)
SMALL = Thing("square", "blue", 0.2, 0.8, 0.7)
SCENE = Scene(1, "two", "white", (LARGE, SMALL), False, True)


def box(shown: npt.NDArray[np.uint8]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what is not black, in shares of the picture."""
    rows, columns = np.nonzero(shown.max(axis=2))
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return left / PICTURE_PX, top / PICTURE_PX, right / PICTURE_PX, bottom / PICTURE_PX


@pytest.mark.parametrize("kind", MAPS)
def test_a_map_covers_the_object_and_nothing_else(kind: ControlKind) -> None:
    alone = Scene(1, "one", "white", (LARGE,), False, True)

    shown = MAPS[kind](alone)

    assert shown.shape == (PICTURE_PX, PICTURE_PX, 3)
    assert shown.dtype == np.uint8
    assert box(shown) == pytest.approx((0.1, 0.1, 0.5, 0.5), abs=0.05)


def test_edges_are_those_that_the_service_draws() -> None:
    drawing, file = render(SCENE), io.BytesIO()
    drawing.save(file, "PNG")
    control = Control(image=file.getvalue(), type="canny", is_map=False)

    drawn = control_map(control, drawing, lambda picture, _is_map: picture, "image", {})

    assert np.array_equal(np.asarray(drawn), canny(SCENE))


def test_a_larger_object_is_nearer_and_its_middle_nearest() -> None:
    grey = depth(SCENE)[..., 0]
    in_large, in_small = (np.asarray(silhouette(thing, PICTURE_PX)) > 127 for thing in SCENE.things)

    assert grey.max() == grey[int(0.3 * PICTURE_PX), int(0.3 * PICTURE_PX)] == 255
    assert grey[in_small].max() < grey[in_large].max()
    assert grey[~(in_large | in_small)].max() == 0
    assert grey[in_small].min() > 0


def test_every_object_has_a_figure_of_its_size() -> None:
    figures = pose(SCENE)
    left, right = figures.copy(), figures.copy()
    left[:, PICTURE_PX * 6 // 10 :] = 0
    right[:, : PICTURE_PX * 6 // 10] = 0

    assert box(left) == pytest.approx((0.1, 0.1, 0.5, 0.5), abs=0.05)
    assert box(right) == pytest.approx((0.7, 0.6, 0.9, 0.8), abs=0.05)
    assert np.abs(FIGURE).max(axis=0) == pytest.approx((0.95, 1.0))


@pytest.mark.parametrize("kind", MAPS)
def test_a_caption_leaves_to_the_map_what_it_shows(kind: ControlKind) -> None:
    random = Random(5)
    scenes = [free_scene(random) for _ in range(40)]

    captions = [vague_caption(scene, random, kind) for scene in scenes]

    for text, scene in zip(captions, scenes, strict=True):
        assert f" on a {scene.background} background" in text
        assert (scene.things[0].shape in text.split()) == (kind == "pose")
    assert {scene.things[0].shape for scene in scenes} <= set(SHAPES)
    assert isinstance(Image.fromarray(MAPS[kind](scenes[0])), Image.Image)
