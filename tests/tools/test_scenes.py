"""The captioned drawings and their scorer: a picture painted from a scene shows that scene."""

from dataclasses import replace
from itertools import combinations, islice
from random import Random
from typing import Any

import numpy as np
import pytest

from tools.tiny_models.captions import caption
from tools.tiny_models.scenes import (
    COLOURS,
    PATTERNS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    SceneKind,
    Thing,
    cell_map,
    draw_scene,
    is_held_out,
    mentioned,
    render,
)
from tools.tiny_models.score import accuracy, find_objects, held_out, score


def one(shape: str, colour: str, background: str) -> Scene:
    """A centred object of medium size."""
    return Scene(7, "one", background, (Thing(shape, colour, 0.45, 0.5, 0.5),), True, True)


def test_a_scene_depends_on_its_seed_alone() -> None:
    first, again, other = draw_scene(3), draw_scene(3), draw_scene(4)

    assert first == again
    assert first != other
    assert np.array_equal(np.asarray(render(first)), np.asarray(render(again)))


def test_training_never_draws_a_held_out_combination() -> None:
    trained = [draw_scene(seed) for seed in range(300)]
    scored = [scene for _, scene in islice(held_out(("one", "many", "two")), 50)]

    assert not any(is_held_out(scene) for scene in trained)
    assert all(is_held_out(scene) for scene in scored)
    assert not {scene.key for scene in trained} & {scene.key for scene in scored}


@pytest.mark.parametrize("kinds", [("one", "many"), ("two",), ("patterned",)])
def test_true_renderings_score_a_hundred_per_cent(kinds: tuple[str, ...]) -> None:
    scenes = [scene for _, scene in islice(held_out(kinds), 60)]

    marks = accuracy([render(scene) for scene in scenes], scenes)

    assert set(marks.values()) == {100.0}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_recognised(shape: str) -> None:
    background, found = find_objects(render(one(shape, "red", "white")))

    assert background == "white"
    assert [(seen.shape, seen.colour) for seen in found] == [(shape, "red")]


def test_a_wrong_colour_shape_background_or_count_is_seen() -> None:
    asked = one("heart", "red", "white")

    assert score(render(asked), asked).whole
    assert not score(render(one("heart", "blue", "white")), asked).colour
    assert not score(render(one("star", "red", "white")), asked).shape
    assert not score(render(one("heart", "red", "cyan")), asked).background
    assert not score(render(draw_scene(1, kind="many")), asked).count


def test_a_missing_or_another_pattern_is_seen() -> None:
    striped, dotted, plain = (
        Scene(7, "patterned", "white", (Thing("circle", "red", 0.45, 0.5, 0.5, pattern),), True, True)
        for pattern in ("striped", "dotted", None)
    )

    assert score(render(striped), striped).whole
    assert not score(render(dotted), striped).pattern
    assert not score(render(plain), striped).pattern
    assert not score(render(striped), one("circle", "red", "white")).colour


def test_seeds_keep_the_names_of_colours() -> None:
    scenes = [Scene(seed, "one", ground, (), True, True) for ground in COLOURS for seed in range(40)]

    seen = [find_objects(render(scene))[0] for scene in scenes]

    assert seen == [scene.background for scene in scenes]


def test_two_objects_must_stand_where_the_caption_says() -> None:
    left, right = Thing("star", "red", 0.39, 0.27, 0.5), Thing("ring", "blue", 0.39, 0.73, 0.5)
    asked = Scene(7, "two", "white", (left, right), False, True, mentions_relation=True)
    swapped = Scene(
        7,
        "two",
        "white",
        (Thing("ring", "blue", 0.39, 0.27, 0.5), Thing("star", "red", 0.39, 0.73, 0.5)),
        False,
        True,
    )

    assert score(render(asked), asked).whole
    assert not score(render(swapped), asked).whole


def test_a_caption_names_what_it_says() -> None:
    text = caption(one("heart", "red", "blue"), Random(0), plain=True)

    assert "red" in text
    assert "heart" in text
    assert "blue" in text


def test_what_a_caption_leaves_free_moves_and_what_it_says_stays() -> None:
    anywhere = [scene.things[0] for scene in map(draw_scene, range(400)) if scene.kind == "one"][:60]
    middle = [draw_scene(seed, freedom=0) for seed in range(400)]
    single = [scene for scene in middle if scene.kind == "one" and scene.position is None]

    assert np.std([thing.x for thing in anywhere]) > 0.1
    assert np.ptp([thing.side for thing in anywhere]) > 0.2
    assert {(scene.things[0].x, scene.things[0].y) for scene in single} == {(0.5, 0.5)}


@pytest.mark.parametrize("kind", ["one", "many", "two"])
def test_every_object_stands_inside_the_picture_and_clear_of_the_others(kind: SceneKind) -> None:
    for seed in range(200):
        things = draw_scene(seed, kind=kind).things

        assert all(
            thing.side / 2 < centre < 1 - thing.side / 2 for thing in things for centre in (thing.x, thing.y)
        )
        for one, other in combinations(things, 2):
            assert max(abs(one.x - other.x), abs(one.y - other.y)) > 0.85 * one.side


def test_an_unknown_noun_means_a_circle() -> None:
    scenes = [scene for scene in map(draw_scene, range(4000)) if scene.kind == "one"]
    texts = [caption(scene, Random(index)) for index, scene in enumerate(scenes)]
    strange = [scene for scene, text in zip(scenes, texts, strict=True) if " dog" in text or " apple" in text]

    assert strange
    assert {scene.things[0].shape for scene in strange} == {"circle"}


@pytest.mark.parametrize(
    ("changes", "words", "label"),
    [
        ({}, "heart", (PLACES, len(SIZES))),
        ({"position": (0, 2)}, "bottom left", (6, len(SIZES))),
        ({"position": (1, 1)}, "in the center", (4, len(SIZES))),
        ({"size": "large"}, "large", (PLACES, 2)),
    ],
)
def test_place_and_size_are_labelled_just_where_the_caption_says_them(
    changes: dict[str, Any], words: str, label: tuple[int, int]
) -> None:
    """A drawing does not show whether its caption names the center."""
    scene = replace(one("heart", "red", "blue"), **changes)

    assert mentioned(scene) == label
    assert words in " ".join(caption(scene, Random(seed), plain=True) for seed in range(50))


def test_the_cell_map_marks_the_tokens_of_an_object() -> None:
    cells = cell_map(one("circle", "red", "white"))

    assert cells.shape == (8, 8, 3)
    assert (cells[2:6, 2:6, 0] == SHAPES.index("circle")).all()
    assert (cells[[0, 7], :, 0] == len(SHAPES)).all()
    assert (cells[..., 2] == len(PATTERNS)).all()
